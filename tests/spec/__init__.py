"""Tests of specs: what each kind means, by worked examples, and what is refused."""
