"""Lists as texts, such as ``fl, pipar`` and ``2,4,8``."""

from __future__ import annotations


def split_list(text: str) -> tuple[str, ...]:
    """Returns the parts of a list such as ``fl, pipar``."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def whole_numbers(text: str) -> tuple[int, ...]:
    """Returns the numbers of a list such as ``1, 2, 4``."""
    return tuple(int(part) for part in split_list(text))
