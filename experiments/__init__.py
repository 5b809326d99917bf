"""Binaries, started by ``pipar NAME`` or ``python -m experiments.NAME``; never imported."""
