"""Tests that run generated kernels under Triton's interpreter; they need TRITON_INTERPRET=1."""
