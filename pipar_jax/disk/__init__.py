"""Atomic files, JSON without NaN, and the log of events."""
