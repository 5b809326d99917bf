"""The console on which commands show tables and sentences."""

from __future__ import annotations

import sys

from rich.console import Console


def make_console(plain_width: int) -> Console:
    """Returns the console for standard output, as wide as the terminal.

    Texts are shown as they are: rich would take brackets and colons in names of models, metrics
    or folders for its markup, and leave out letters or fail.

    Args:
      plain_width: Its width without a terminal, in characters.
    """
    width = None if sys.stdout.isatty() else plain_width
    return Console(width=width, highlight=False, markup=False, emoji=False)
