"""Benchmarks: ratios against a peer, paired in one process. They print; they never assert about time."""
