"""Seeded faults: one-line mistakes, each of which must make the tests named with it fail; `python -m tests.faults`."""
