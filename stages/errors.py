"""The error type of the stages package."""

from __future__ import annotations


class StageError(Exception):
    """A model, a unit or a cut is illegal; the message says what, where and what to do."""
