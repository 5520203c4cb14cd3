"""attncc compiles a declarative attention spec into Triton kernels and bounds their speedup before anything runs."""
