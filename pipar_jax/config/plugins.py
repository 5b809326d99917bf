"""Functions of the user, ``MODULE:FUNCTION``: finds and calls them and reports their errors.

An exception in such a function is reported in one line: the function, the exception with its
message, and the line of the user's code that raised it. The exception is the cause of the error,
and ``of_user`` is set, so that a process writes the traceback to its log.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import json
import re
import shlex
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from pipar_jax.config.schema import did_you_mean
from pipar_jax.disk.json_text import JsonObject
from pipar_jax.errors import ConfigError, PiparError
from stages.foreign import describe

#: Begins the value of a field that names a function of the user's.
OWN = "module:"


def is_own(value: str) -> bool:
    """Returns whether a field's value names a function of the user's."""
    return re.fullmatch(r"module:[\w.]+:\w+", value) is not None


def name_of(function: Callable[..., Any], what: str) -> str:
    """Returns the name ``module:NAME:FUNCTION`` by which any process finds a user's function.

    Args:
      function: The function.
      what: The argument that it is, for the message.

    Raises:
      ConfigError: It is not at the top level of a module that can be imported.
    """
    module = getattr(function, "__module__", None) or "?"
    name = getattr(function, "__qualname__", type(function).__name__)
    there = getattr(sys.modules.get(module), name, None)
    value = f"{OWN}{module}:{name}"
    if module == "__main__" or there is not function or not is_own(value):
        raise ConfigError(
            f"{what}={module}.{name} cannot be imported by the processes of a run: define it at "
            "the top level of a module other than the script that is started, or pass what it "
            f"returns{', as stages.trace(NETWORK, EXAMPLE)' if what == 'model' else ''}"
        )
    return value


def check_named(value: str, field: str, what: str, known: Collection[str]) -> None:
    """Checks that a field names something registered or a function of the user's.

    Args:
      value: The field's value.
      field: Its dotted path.
      what: What it names, such as ``an optimiser``.
      known: The registered names.

    Raises:
      ConfigError: It names neither.
    """
    if value not in known and not is_own(value):
        raise ConfigError(
            f"{field}={value[:120]!r} is not {what}{did_you_mean(value, known)} "
            f"(known: {', '.join(known)}, module:NAME:FUNCTION)"
        )


def check_args(text: str, field: str, owner: str, value: str) -> None:
    """Checks the form of the arguments of a user's function.

    Args:
      text: Pairs NAME=VALUE.
      field: The field that holds them.
      owner: The field that names the function.
      value: Its value.

    Raises:
      ConfigError: The text is not a list of such pairs, or there is no such function.
    """
    if text and not is_own(value):
        raise ConfigError(
            f"{field}={text[:120]!r} is for a function of your own: set "
            f"{owner}=module:NAME:FUNCTION"
        )
    check_pairs(text, field)


def check_pairs(text: str, field: str) -> None:
    """Checks that a text is a list of pairs NAME=VALUE.

    Raises:
      ConfigError: It is not.
    """
    said = f"{field}={text[:120]!r}"
    try:
        pairs = shlex.split(text)
    except ValueError as error:
        raise ConfigError(f"{said} cannot be read: {error}") from error
    wrong = [pair[:120] for pair in pairs if not re.match(r"[A-Za-z_]\w*=", pair)]
    if wrong:
        raise ConfigError(f"{said}: {wrong[0]!r} is not NAME=VALUE; write 'width=16 norm=group'")


def read_args(text: str) -> JsonObject:
    """Reads arguments: "width=16 norm=group" gives {"width": 16, "norm": "group"}.

    Args:
      text: Pairs NAME=VALUE, separated by blanks; a value that is not valid JSON is a string.
    """
    given: JsonObject = {}
    for pair in shlex.split(text):
        name, _, value = pair.partition("=")
        try:
            given[name] = json.loads(value)
        except (json.JSONDecodeError, RecursionError):  # nested too deep
            given[name] = value
    return given


def make(
    value: str,
    what: str,
    kind: type[PiparError],
    *,
    args: str,
    field: str,
    facts: Mapping[str, Any],
    required: Collection[str] = (),
) -> Any:
    """Calls a user's function with its arguments, and with the facts that it has parameters for.

    Args:
      value: ``module:NAME:FUNCTION``.
      what: Begins the messages, such as ``own network module:mine:net``.
      kind: The error to raise.
      args: Pairs NAME=VALUE from the configuration, which precede facts of the same name.
      field: The field that holds them.
      facts: What the run knows, by the names of parameters.
      required: Names of facts that the function must have parameters for.

    Returns:
      The function's result.

    Raises:
      PiparError: The function cannot be found, fails, or has no parameter of a name.
    """
    function = find(value.removeprefix(OWN), what, kind)
    with guarded(f"{what} cannot be called", kind):
        known = inspect.signature(function).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values())
    given = {name: fact for name, fact in facts.items() if name in known or name in required}
    own = read_args(args)
    names = ", ".join(known) or "none"
    for name in {**given, **own}:
        if name not in known and not takes_any:
            said = f"{field}={args!r}: " if name in own else ""
            raise kind(f"{said}{what} has no parameter {name!r} (known: {names})")
    return function(**{**given, **own})


def find(path: str, what: str, kind: type[PiparError]) -> Callable[..., Any]:
    """Returns a user's function, wrapped so that it raises errors as ``guarded`` does.

    Args:
      path: ``MODULE:FUNCTION``.
      what: Begins the messages, such as ``own data module:mine:load``.
      kind: The error to raise.

    Raises:
      PiparError: The module cannot be found, fails while it is imported, or has no such function.
    """
    name, _, function = path.partition(":")
    try:
        with guarded(f"{what} cannot be imported", kind):
            module = importlib.import_module(name)
    except PiparError as error:
        cause = error.__cause__
        if isinstance(cause, ModuleNotFoundError) and cause.name in _parents(name):
            raise kind(
                f"{what} cannot be imported: {cause}: it must be in the working directory of the "
                "command, or installed"
            ) from cause
        raise
    made = getattr(module, function, None)
    if not callable(made):
        raise kind(
            f"{what} cannot be imported: module {name!r} ({getattr(module, '__file__', None)}) has "
            f"no function {function!r}"
        )

    @functools.wraps(made)
    def call(*arguments: Any, **named: Any) -> Any:
        with guarded(f"{what} failed", kind):
            return made(*arguments, **named)

    return call


@contextmanager
def guarded(what: str, kind: type[PiparError]) -> Iterator[None]:
    """Turns any exception of a user's code into an error that names the code and its line.

    Args:
      what: Begins the message, such as ``own data module:mine:load failed``.
      kind: The error to raise.

    Raises:
      PiparError: The user's code raised an exception, or tried to end the process.
    """
    try:
        yield
    except (Exception, SystemExit) as error:
        made = kind(f"{what}: {describe(error)}")
        made.of_user = True
        raise made from error


def _parents(name: str) -> set[str]:
    """Returns the names of a module and of its parent packages."""
    parts = name.split(".")
    return {".".join(parts[:count]) for count in range(1, len(parts) + 1)}
