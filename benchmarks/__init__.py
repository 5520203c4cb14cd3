"""Benchmarks and evidence, run by hand or through the Makefile."""
