"""The command line of binaries without a configuration, whose few flags are absl's own.

They end as the others do: one line about an error, the same exit codes, the same ``--help``,
``--version``, ``--flagfile`` and ``--debug``.
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
from pipar_jax.launch.flags import read_flagfiles, terminal_width, two_columns
from pipar_jax.launch.process import (
    ASKED_TO_END,
    WRONG_USE,
    code_of,
    heed_termination,
    leave,
    open_streams,
    perform,
)
from pipar_jax.report import logs

#: What absl itself and its logging define; the same for every program, and of no use here.
_FOREIGN = ("absl.", "ml_collections.", "jax.", "tensorflow_datasets.")
_HELP = ("-h", "--help", "-help", "--helpfull", "--helpshort")


absl_flags.disclaim_key_flags()  # a path that define_path makes belongs to whoever calls it


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
      name: Its name.
      default: Its value where it is not given.
      text: Its help.
      required: Whether the binary needs it.
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
      main: Takes the arguments that are not flags.
      takes: What the arguments without a flag are, for the help; empty: there are none.
    """
    open_streams()
    heed_termination()
    logs.leave_out_tpu()
    values = absl_flags.FLAGS
    if "debug" not in values:
        absl_flags.DEFINE_boolean("debug", False, "Show tracebacks.")

    def tell(event: dict[str, Any]) -> None:
        print(f"error: {event['error']}", file=sys.stderr)

    try:
        arguments = read_flagfiles(sys.argv[1:])
        if any(one in _HELP for one in arguments):
            print(_make_help(takes), flush=True)
            leave(0)
        if "--version" in arguments:
            print(f"pipar {__version__}", flush=True)
            leave(0)
        rest = _parse(arguments)
        if rest and not takes:
            raise ConfigError(f"unexpected argument {rest[0]!r}: all options start with --")
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        leave(WRONG_USE)
    except KeyboardInterrupt as error:
        leave(code_of(error))
    except BrokenPipeError:  # somebody read the head of the help
        leave(0)
    code = perform(lambda: main(rest), tell, debug=bool(values["debug"].value))
    if code in ASKED_TO_END:
        print(ASKED_TO_END[code], file=sys.stderr)
    leave(code)


def _parse(arguments: list[str]) -> list[str]:
    """Sets absl's flags and returns the arguments that are none.

    Raises:
      ConfigError: A flag is unknown or its value wrong.
    """
    values = absl_flags.FLAGS
    try:
        return list(values([sys.argv[0], *arguments])[1:])  # type: ignore[no-untyped-call]
    except absl_flags.UnrecognizedFlagError as error:
        near = did_you_mean(f"--{error.flagname}", [f"--{one}" for one in _own_flags()])
        raise ConfigError(
            f"--{error.flagname} is not a flag{near} (all of them: --help)"
        ) from error
    except absl_flags.Error as error:
        if missing := re.findall(r"--(\w+) must have a value", str(error)):
            flags = " and ".join(f"--{one}" for one in missing)
            raise ConfigError(
                f"{flags} {'is' if len(missing) == 1 else 'are'} missing (what to give: --help)"
            ) from error
        raise ConfigError(" ".join(str(error).split())) from error


def _own_flags() -> dict[str, str]:
    """Returns the flags that the binary and the project define: name to help."""
    by_module = absl_flags.FLAGS.flags_by_module_dict()
    return {
        one.name: one.help or ""
        for module, some in by_module.items()
        if not module.startswith(_FOREIGN)
        for one in some
    }


def _make_help(takes: str) -> str:
    """Returns what the main module's docstring says, the usage, and every flag."""
    name, doc = pathlib.Path(sys.argv[0]).stem, sys.modules["__main__"].__doc__ or ""
    own = {
        **_own_flags(),
        "flagfile": "File with further flags, one in a line.",
        "version": "Print the version and end.",
        "help": "Print this and end.",
    }
    rows = [(f"--{flag}", text) for flag, text in own.items()]
    usage = " ".join(filter(None, [f"usage: pipar {name}", takes, "[--FLAG=VALUE ...]"]))
    lines = ["flags:", *two_columns(rows, terminal_width())]
    return "\n\n".join([doc.strip(), usage, "\n".join(lines)])
