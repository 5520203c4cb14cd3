"""Passes: graph in, graph out, ending in a Plan."""
