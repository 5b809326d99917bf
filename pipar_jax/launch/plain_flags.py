"""The command line of binaries without a configuration, based on absl's flags.

Errors, exit codes, ``--help``, ``--version``, ``--flagfile`` and ``--debug`` are the same as in
binaries with a configuration.
"""

from __future__ import annotations

import pathlib
import re
import sys
from collections.abc import Callable
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


absl_flags.disclaim_key_flags()  # attribute a flag of define_path to its caller


class _Path(absl_flags.ArgumentParser[pathlib.Path]):
    """A file or folder; ``~`` is the user's home."""

    def parse(self, argument: str) -> pathlib.Path:
        try:
            return pathlib.Path(argument).expanduser()
        except RuntimeError as error:
            raise ValueError(str(error)) from error


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
    made: absl_flags.FlagHolder[Any] = absl_flags.DEFINE(
        _Path(), name, default, text, required=required
    )
    return made


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


def _make_help(takes: str) -> str:
    """Returns the help: the main module's docstring, usage, and all flags."""
    name, doc = pathlib.Path(sys.argv[0]).stem, sys.modules["__main__"].__doc__ or ""
    own = {
        **_own_flags(),
        "flagfile": "File with further flags, one per line.",
        "version": "Print the version and exit.",
        "help": "Print this help and exit.",
    }
    rows = [(f"--{flag}", text) for flag, text in own.items()]
    usage = " ".join(filter(None, [f"usage: pipar {name}", takes, "[--FLAG=VALUE ...]"]))
    lines = ["flags:", *two_columns(rows, terminal_width())]
    return "\n\n".join([doc.strip(), usage, "\n".join(lines)])
