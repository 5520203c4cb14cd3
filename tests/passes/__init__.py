"""Tests of the passes: block masks against brute force, and what every pass promises."""
