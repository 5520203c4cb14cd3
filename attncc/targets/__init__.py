"""Devices that attncc plans for."""

from __future__ import annotations

from attncc.targets.records import TARGETS, Target, target

__all__ = ["TARGETS", "Target", "target"]
