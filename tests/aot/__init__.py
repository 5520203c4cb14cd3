"""Tests that compile for named GPUs without one; they must not see TRITON_INTERPRET."""
