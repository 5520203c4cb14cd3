"""Runnable examples; `python -m examples.demo` runs them all."""
