"""Runs on a real cluster of several nodes, from which something is taken at a random point: `make chaos N=20`."""
