"""`python -m attncc`: the command line, without an install."""

from __future__ import annotations

from attncc.cli import main

if __name__ == "__main__":
    main()
