"""The tests; `make test` runs them in three processes (see the Makefile)."""
