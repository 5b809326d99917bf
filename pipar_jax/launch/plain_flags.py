"""The command line of binaries without a configuration, based on absl's flags.

Errors, exit codes, ``--help``, ``--version``, ``--flagfile`` and ``--debug`` are the same as in
binaries with a configuration.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import pathlib
import re
import sys
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

from absl import flags as absl_flags

from pipar_jax import __version__
from pipar_jax.config.schema import did_you_mean
from pipar_jax.errors import ConfigError
from pipar_jax.launch.binary import begin, finish, show
from pipar_jax.launch.flags import terminal_width, two_columns

#: Flags that absl and its logging define; they are not shown.
_FOREIGN = ("absl.", "ml_collections.", "jax.", "tensorflow_datasets.")
_HELP = ("-h", "--help", "-help", "--helpfull", "--helpshort")


absl_flags.disclaim_key_flags()  # attribute a flag of define to its caller


class _Read(absl_flags.ArgumentParser[Any]):
    """What a function reads from a flag's text; defaults of other types are as they are."""

    def __init__(self, read: Callable[[str], Any]) -> None:
        self._read = read

    def parse(self, argument: Any) -> Any:
        return self._read(argument) if isinstance(argument, str) else argument


def define(
    name: str, default: Any, text: str, read: Callable[[str], Any], *, required: bool = False
) -> absl_flags.FlagHolder[Any]:
    """Defines a flag whose value is checked while the command line is read.

    Args:
      name: Name of the flag.
      default: Default value.
      text: Help text.
      read: Returns the value of a text, or raises ``ValueError``, whose text follows the flag's
        name; see ``one_of``, ``positive`` and ``list_of``.
      required: Whether the flag must be given.
    """
    made: absl_flags.FlagHolder[Any] = absl_flags.DEFINE(
        _Read(read), name, default, text, required=required
    )
    return made


def define_path(
    name: str, default: str | None, text: str, *, required: bool = False
) -> absl_flags.FlagHolder[Any]:
    """Defines a flag whose value is a ``pathlib.Path``, or None.

    Args:
      name: Name of the flag.
      default: Default value.
      text: Help text.
      required: Whether the flag must be given.
    """
    return define(name, default, text, _read_path, required=required)


def define_folder(name: str, text: str, *, exists: bool = False) -> absl_flags.FlagHolder[Any]:
    """Defines a flag that names a folder; empty: none. ``~`` is the user's home.

    Args:
      name: Name of the flag.
      text: Help text.
      exists: Whether the folder must be there already.
    """
    return define(name, "", text, functools.partial(_read_folder, exists=exists))


def _read_folder(text: str, *, exists: bool) -> str:
    if not text:
        return text
    path = _read_path(text)
    if os.path.isfile(path):
        raise ValueError(f"{path} is a file: name a folder")
    if exists and not os.path.isdir(path):
        raise ValueError(f"there is no folder {path}")
    return str(path)


def as_path(text: str) -> pathlib.Path:
    """Returns the file or folder that an argument names; ``~`` is the user's home.

    Raises:
      ConfigError: It is in the home of somebody whom this system does not know.
    """
    try:
        return _read_path(text)
    except ValueError as error:
        raise ConfigError(f"{text!r} is not a path: {error}") from error


def one_of(known: Iterable[str]) -> Callable[[str], str]:
    """Returns a reader for ``define`` that takes names out of some."""
    names = tuple(known)

    def read(text: str) -> str:
        if text not in names:
            near = did_you_mean(text, names)
            raise ValueError(f"{text!r} is not known{near} (known: {', '.join(names)})")
        return text

    return read


def positive(kind: type[int] | type[float]) -> Callable[[str], Any]:
    """Returns a reader for ``define`` that takes finite numbers above 0."""
    expected = "a whole number" if kind is int else "a number"

    def read(text: str) -> float:
        value = math.nan
        with contextlib.suppress(ValueError):
            value = kind(text)
        if not 0 < value < math.inf:
            raise ValueError(f"{text!r} is not {expected} above 0")
        return value

    return read


def list_of(read: Callable[[str], Any], *, once: bool = False) -> Callable[[str], list[Any]]:
    """Returns a reader for ``define`` that takes values separated by commas.

    Args:
      read: The reader of a value.
      once: Whether a value that is repeated counts once.
    """

    def read_all(text: str) -> list[Any]:
        values = [read(part.strip()) for part in text.split(",")]
        return list(dict.fromkeys(values)) if once else values

    return read_all


def _read_path(text: str) -> pathlib.Path:
    try:
        return pathlib.Path(text).expanduser()
    except RuntimeError as error:  # somebody's home
        raise ValueError(str(error)) from error


def run(main: Callable[[list[str]], object], *, takes: str = "") -> NoReturn:
    """Parses the command line into absl's flags, runs a binary's main and ends the process.

    The exit code is 0, 1 after an error (one line on standard error), 2 for a wrong command line,
    130 after Ctrl-C and 143 after SIGTERM.

    Args:
      main: Called with the arguments that are not flags.
      takes: Names the arguments that are not flags, for the help; empty: none are accepted.
    """
    values = absl_flags.FLAGS
    if "debug" not in values:
        absl_flags.DEFINE_boolean("debug", False, "Show tracebacks.")

    def read(arguments: list[str]) -> list[str]:
        if any(argument in _HELP for argument in arguments):
            show(_make_help(takes))
        if "--version" in arguments:
            show(f"pipar {__version__}")
        rest = _parse(arguments)
        if rest and not takes:
            raise ConfigError(f"unexpected argument {rest[0]!r}: all options start with --")
        return rest

    rest = begin(read)
    finish(lambda: main(rest), debug=bool(values["debug"].value))


def _parse(arguments: list[str]) -> list[str]:
    """Sets absl's flags and returns the other arguments.

    Raises:
      ConfigError: A flag is unknown or its value not valid.
    """
    values = absl_flags.FLAGS
    try:
        return list(values([sys.argv[0], *arguments])[1:])  # type: ignore[no-untyped-call]
    except absl_flags.UnrecognizedFlagError as error:
        near = did_you_mean(f"--{error.flagname}", [f"--{flag}" for flag in _own_flags()])
        raise ConfigError(
            f"--{error.flagname} is not a flag{near} (all of them: --help)"
        ) from error
    except absl_flags.Error as error:
        if missing := re.findall(r"--(\w+) must have a value", str(error)):
            flags = " and ".join(f"--{flag}" for flag in missing)
            raise ConfigError(
                f"{flags} {'is' if len(missing) == 1 else 'are'} missing (what to give: --help)"
            ) from error
        raise ConfigError(" ".join(str(error).split())) from error


def _own_flags() -> dict[str, str]:
    """Returns the help texts of the flags that the binary and the project define, by name."""
    by_module = absl_flags.FLAGS.flags_by_module_dict()
    return {
        flag.name: flag.help or ""
        for module, some in by_module.items()
        if not module.startswith(_FOREIGN)
        for flag in some
    }


def _command() -> str:
    """Returns how the running module is called: as a command of pipar, or by its module's name."""
    spec = sys.modules["__main__"].__spec__
    if spec is not None and spec.name.startswith("experiments.") and spec.name.count(".") > 1:
        return f"python -m {spec.name}"
    return f"pipar {pathlib.Path(sys.argv[0]).stem}"


def _make_help(takes: str) -> str:
    """Returns the help: the main module's docstring, usage, and all flags."""
    doc = sys.modules["__main__"].__doc__ or ""
    own = {
        **_own_flags(),
        "flagfile": "File with further flags, one per line.",
        "version": "Print the version and exit.",
        "help": "Print this help and exit.",
    }
    rows = [(f"--{flag}", text) for flag, text in own.items()]
    usage = " ".join(filter(None, [f"usage: {_command()}", takes, "[--FLAG=VALUE ...]"]))
    lines = ["flags:", *two_columns(rows, terminal_width())]
    return "\n\n".join([doc.strip(), usage, "\n".join(lines)])
