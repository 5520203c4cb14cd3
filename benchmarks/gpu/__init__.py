"""Checks and times every kind of kernel on the GPU of this machine: `python -m benchmarks.gpu`."""
