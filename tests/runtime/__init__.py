"""Kernels as they are called: engines, inputs, ops, tile lists and the cache."""

from __future__ import annotations
