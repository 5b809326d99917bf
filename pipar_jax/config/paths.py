"""Fields that name files and folders: made absolute once, in one place, for all processes of a run.

Which fields these are the schema says (``option(..., path=...)``). A relative path counts from the
folder in which the command was given, and ``~`` is the user's home; whoever reads a resolved
configuration, in whatever folder, finds the same file.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

from pipar_jax.config import schema
from pipar_jax.config.schema import ConfigField
from pipar_jax.errors import ConfigError


def is_path(one: ConfigField) -> bool:
    """Returns whether an option's text is a path, or may hold one behind a prefix."""
    return one.field.metadata["path"] is not None


def expand(one: ConfigField, value: Any) -> Any:
    """Returns an option's value with its path absolute; other values as they are.

    Raises:
      ConfigError: It cannot be a path: a home that is not there, or a character no path has.
    """
    prefix = one.field.metadata["path"]
    if prefix is None or not isinstance(value, str) or not value.lower().startswith(prefix):
        return value
    text = value[len(prefix) :].strip()
    if not text:
        return value
    if "\0" in text:
        raise ConfigError(f"{one.path}={value!r} is not a path: take out the character \\0")
    try:
        found = Path(text).expanduser().absolute()
    except (RuntimeError, OSError) as error:
        raise ConfigError(
            f"{one.path}={value!r} cannot be made absolute ({error}): write the whole path"
        ) from error
    try:
        os.lstat(found)
    except OSError as error:  # that it is not there is no fault: it may be made
        if error.errno == errno.ENAMETOOLONG:
            raise ConfigError(
                f"{one.path}={value[:80]!r}… is longer than a path may be: shorten it"
            ) from error
    return value[: len(prefix)] + str(found)


def expand_all(root: Any, prefix: str = "") -> None:
    """Makes every path of a dataclass of options absolute, in place.

    Args:
      root: An instance, such as a configuration, whose fields fit their types.
      prefix: What stands before the fields' names in messages.

    Raises:
      ConfigError: A text cannot be a path.
    """
    for one in schema.options(root):
        holder = root
        *groups, name = one.path.split(".")
        for group in groups:
            holder = getattr(holder, group)
        full = one._replace(path=f"{prefix}{one.path}")
        setattr(holder, name, expand(full, getattr(holder, name)))


def shown(path: str | Path) -> str:
    """Returns a path as it is told to the user: from the present folder on, if it is below it."""
    try:
        return str(Path(path).relative_to(Path.cwd()))
    except (ValueError, OSError):
        return str(path)
