"""Tests of expressions and graphs: the interpretations agree, every form reads back, what is broken is refused."""
