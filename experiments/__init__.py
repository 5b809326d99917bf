"""Binaries, started with ``pipar NAME`` or ``python -m experiments.NAME``. Nobody imports them."""
