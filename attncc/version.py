"""The version of attncc, also where it runs from a checkout without an install."""

from __future__ import annotations

VERSION = "0.1.0"
