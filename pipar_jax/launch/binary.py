"""The start and the end that all binaries share: signals, errors in one line, exit codes."""

from __future__ import annotations

import contextlib
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import NoReturn, TypeVar

from absl import flags as absl_flags

from pipar_jax.disk.files import describe_reading
from pipar_jax.disk.json_text import JsonObject
from pipar_jax.errors import ConfigError, DataError, DiskError, PlanError, RunError
from pipar_jax.launch.process import (
    ASKED_TO_END,
    WRONG_USE,
    code_of,
    heed_termination,
    leave,
    perform,
)
from pipar_jax.launch.streams import open_streams
from pipar_jax.report import logs

T = TypeVar("T")


def begin(read: Callable[[list[str]], T]) -> T:
    """Prepares the process and returns what its command line means, or ends it with an error.

    Args:
      read: Takes the command line, with the flags of every ``--flagfile`` in its place.
    """
    open_streams()
    heed_termination()
    logs.leave_out_tpu()
    debug = False
    try:
        arguments = read_flagfiles(sys.argv[1:])
        debug = any(argument.lstrip("-") in ("debug", "config.debug") for argument in arguments)
        return read(arguments)
    except (ConfigError, OSError) as error:
        if debug:
            traceback.print_exc()
        print(f"error: {describe_reading(error)}", file=sys.stderr)
        leave(WRONG_USE)
    except KeyboardInterrupt as error:
        leave(code_of(error))


@contextlib.contextmanager
def wrong_use() -> Iterator[None]:
    """Makes an error in what the command line names, such as a file, one of the command line.

    Raises:
      ConfigError: The block could not read data, a plan or a run.
    """
    try:
        yield
    except DiskError:  # that something cannot be written
        raise
    except (DataError, PlanError, RunError) as error:
        raise ConfigError(str(error)) from error


def show(text: str) -> NoReturn:
    """Prints a text that was asked for instead of work, such as the help, and ends the process."""
    finish(lambda: print(text), debug=False)


def finish(task: Callable[[], object], *, debug: bool) -> NoReturn:
    """Runs a binary's work and ends the process with its exit code.

    Args:
      task: The work.
      debug: Whether to print the traceback of an error.
    """

    def tell(event: JsonObject) -> None:
        print(f"error: {event['error']}", file=sys.stderr)

    def work() -> None:
        task()
        sys.stdout.flush()  # that it cannot be printed is an error of the work

    logs.begin_plain()
    code = perform(work, tell, debug=debug)
    if code in ASKED_TO_END:
        print(ASKED_TO_END[code], file=sys.stderr)
    leave(code)


def read_flagfiles(arguments: list[str]) -> list[str]:
    """Returns a command line with the flags of every ``--flagfile`` in its place.

    Raises:
      ConfigError: A file cannot be read.
    """
    try:
        # As in GNU tools, flags may follow other arguments.
        values = absl_flags.FlagValues()  # type: ignore[no-untyped-call]
        read: list[str] = values.read_flags_from_files(arguments, force_gnu=True)  # type: ignore[no-untyped-call]
    except (absl_flags.Error, OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--flagfile cannot be read: {' '.join(str(error).split())}") from error
    return read
