"""The float64 oracle: dense attention written from the definitions, sharing no code with attncc."""

from __future__ import annotations

from tests.oracle.attention import attention, dense_in_dtype
from tests.oracle.errors import errors, errors_of_dense, within_float32
from tests.oracle.inputs import random_inputs
from tests.oracle.masks import concrete, dense_mask

__all__ = ["attention", "concrete", "dense_in_dtype", "dense_mask", "errors", "errors_of_dense", "random_inputs", "within_float32"]
