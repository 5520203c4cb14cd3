"""The command line: one file a command group. torch and triton are imported by the commands that run them, when they run."""

from __future__ import annotations


def main() -> None:
    """Runs the command line; the process exits with 0, 1 (bad input), 2 (usage), or 3 (`verify`: errors above the limit)."""
    from attncc.cli.app import app

    app()
