"""Binaries, started with ``python -m experiments.NAME``. Nobody imports them."""
