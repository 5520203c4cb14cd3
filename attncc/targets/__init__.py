"""Devices that attncc plans for."""

from attncc.targets.records import TARGETS, Target, target

__all__ = ["TARGETS", "Target", "target"]
