"""Fuzzing of what a front end or a guest can reach: ``python -m tests.fuzz --help``."""
