"""The verbs of `raytune-ds`.

Each module has a SUMMARY, `add` for its arguments, and `run`, which imports what it needs.
"""
