"""Fields that name files and folders; they are made absolute once, for all processes of a run.

The schema marks these fields (``option(..., path=...)``). A relative path is relative to the
working directory of the command, and ``~`` is the user's home, so that a resolved configuration
names the same files in any directory.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

from pipar_jax.config import schema
from pipar_jax.config.schema import ConfigField
from pipar_jax.errors import ConfigError


def is_path(option: ConfigField) -> bool:
    """Returns whether an option's text is a path, or may contain one after a prefix."""
    return option.field.metadata["path"] is not None


def expand(option: ConfigField, value: Any) -> Any:
    """Returns an option's value with its path made absolute; other values are unchanged.

    Raises:
      ConfigError: The value cannot be a path: its home directory is unknown, or it contains a
        character that paths cannot contain.
    """
    marked = option.field.metadata["path"]
    if marked is None or not isinstance(value, str):
        return value
    prefixes = (marked,) if isinstance(marked, str) else marked
    prefix = next((some for some in prefixes if value.lower().startswith(some)), None)
    if prefix is None:
        return value
    if value in option.field.metadata["words"]:
        return value
    text = value[len(prefix) :].strip()
    if not text:
        return value
    if "\0" in text:
        raise ConfigError(f"{option.path}={value!r} is not a path: remove the character \\0")
    try:
        path = Path(text).expanduser().absolute()
    except (RuntimeError, OSError) as error:
        raise ConfigError(
            f"{option.path}={value!r} cannot be made absolute ({error}): write the absolute path"
        ) from error
    try:
        os.lstat(path)
    except OSError as error:  # a missing file is not an error: it may be created
        if error.errno == errno.ENAMETOOLONG:
            raise ConfigError(
                f"{option.path}={value[:80]!r}… is longer than a path can be: shorten it"
            ) from error
    return value[: len(prefix)] + str(path)


def expand_all(root: Any, prefix: str = "") -> None:
    """Makes all paths in a dataclass of options absolute, in place.

    Args:
      root: An instance, such as a configuration, whose fields have valid types.
      prefix: Precedes the fields' names in messages.

    Raises:
      ConfigError: A text cannot be a path.
    """
    for option in schema.options(root):
        holder = root
        *groups, name = option.path.split(".")
        for group in groups:
            holder = getattr(holder, group)
        full = option._replace(path=f"{prefix}{option.path}")
        setattr(holder, name, expand(full, getattr(holder, name)))


def shown(path: str | Path) -> str:
    """Returns a path as shown to the user: relative to the working directory if it is below."""
    try:
        return str(Path(path).relative_to(Path.cwd()))
    except (ValueError, OSError):
        return str(path)
