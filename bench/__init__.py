"""Benchmarks: one registry of cases, timed by ``python -m bench report`` and by ``pytest bench/``."""
