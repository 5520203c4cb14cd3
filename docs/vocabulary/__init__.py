"""Writes docs/spec.md and its pictures from the models: `python -m docs.vocabulary`, or `make docs`."""
