"""The error type of the stages package."""

from __future__ import annotations


class StageError(Exception):
    """A model, unit or cut is not valid; the message says what, where and how to fix it."""
