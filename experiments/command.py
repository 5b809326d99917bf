"""The command ``pipar``, which runs the binaries of the project by name.

``pipar train …`` is ``python -m experiments.train …`` from any directory: the user's own modules
are found there, but do not shadow packages of the project.
"""

from __future__ import annotations

import ast
import os
import pathlib
import pkgutil
import runpy
import sys
from typing import NoReturn

import experiments
from pipar_jax import __version__

FOLDER = pathlib.Path(experiments.__file__).parent
#: The commands at the top of the help, in this order; the others follow alphabetically.
FIRST = (
    "quickstart",
    "train",
    "compare",
    "server",
    "device",
    "node",
    "plan",
    "profile",
    "report",
    "describe",
    "attack",
)


def commands() -> dict[str, str]:
    """Returns the descriptions of all commands by name, the most used first."""
    modules = pkgutil.iter_modules([str(FOLDER)])
    found = {module.name for module in modules if not module.ispkg} - {"command"}
    if not (FOLDER / "benchmarks").is_dir():  # an installation has no measurement code
        found = {name for name in found if not _measures(FOLDER / f"{name}.py")}
    order = [*(name for name in FIRST if name in found), *sorted(found - set(FIRST))]
    return {name: _about(FOLDER / f"{name}.py") for name in order}


def make_help() -> str:
    """Returns the list of all commands."""
    from pipar_jax.launch.flags import terminal_width, two_columns

    width = terminal_width()
    rows = list(commands().items())
    return "\n".join(
        [
            "Trains one model on edge devices and a server together.",
            "",
            "usage: pipar COMMAND [--FLAG=VALUE ...]",
            "",
            *two_columns(rows, width),
            "",
            "pipar COMMAND --help lists the flags of a command; begin with: pipar train "
            "--config=digits",
        ]
    )


def put_in_order(path: list[str]) -> None:
    """Puts the project's packages on the module path, and the working directory at its end.

    Args:
      path: The module path, such as ``sys.path``; modified in place.
    """
    # An editable installation finds them through a hook after the path: add them here.
    home = str(FOLDER.parent)
    if home not in path:
        path.append(home)
    try:
        here = os.getcwd()
    except OSError:  # the folder was deleted
        return
    path[:] = [one for one in path if one not in ("", here) or one == home]
    if here not in path:
        path.append(here)


def main() -> NoReturn:
    """Runs the command that the command line names and ends the process."""
    try:
        _run()
    except KeyboardInterrupt:  # before anything heeds it
        print("interrupted", file=sys.stderr, flush=True)
        os._exit(130)


def _run() -> NoReturn:
    """Does what ``main`` says; loads the rest here, so that Ctrl-C while it loads is heeded."""
    from pipar_jax.config.schema import did_you_mean
    from pipar_jax.launch.binary import show
    from pipar_jax.launch.process import WRONG_USE, code_of, heed_termination, leave
    from pipar_jax.launch.streams import open_streams

    open_streams()
    heed_termination()
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name in ("-h", "--help", "help"):
        show(make_help())
    if name == "--version":
        show(f"pipar {__version__}")
    known = commands()
    wanted = name.replace("-", "_")
    if wanted not in known:
        what = f"{name!r} is not a command of pipar" if name else "pipar needs a command"
        near = did_you_mean(wanted, known) if name else ""
        if wanted and os.path.isfile(FOLDER / f"{wanted}.py") and wanted != "command":
            what, near = f"{name} is a measurement binary and needs a clone of the sources", ""
        print(f"error: {what}{near} (all of them: pipar --help)", file=sys.stderr)
        leave(WRONG_USE)
    put_in_order(sys.path)
    # For child processes: the working directory comes last there as well.
    os.environ["PYTHONSAFEPATH"] = "1"
    sys.argv[1:2] = []
    try:
        runpy.run_module(f"experiments.{wanted}", run_name="__main__", alter_sys=True)
    except KeyboardInterrupt as error:  # while loading; later the binary handles it
        leave(code_of(error))
    leave(0)


def _measures(path: pathlib.Path) -> bool:
    """Returns whether a binary needs measurement code, which only a clone contains."""
    text = path.read_text(encoding="utf-8")
    return "experiments.benchmarks" in text or "experiments.latency_data" in text


def _about(path: pathlib.Path) -> str:
    """Returns the first sentence of a module's docstring; nothing is imported."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return text.partition("\n\n")[0].replace("\n", " ").rstrip(".")


if __name__ == "__main__":
    main()
