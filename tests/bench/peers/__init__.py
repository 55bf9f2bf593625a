"""One side of a bench each: a process that trains on the same documents, a pass whenever it is told to.

python -m tests.bench.peers.NAME CASE.json
"""
