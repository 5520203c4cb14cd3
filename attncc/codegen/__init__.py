"""Prints a Plan as a readable Triton module."""
