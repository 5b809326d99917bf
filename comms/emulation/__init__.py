"""Emulated links: rates, delays and timetables, without root."""
