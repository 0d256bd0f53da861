"""Benchmarks: each case runs in a process of its own, against a baseline in the same run. See README.md."""
