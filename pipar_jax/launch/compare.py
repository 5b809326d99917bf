"""Trains one setting by several methods, one after another, and compares the results."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from pipar_jax.config import Config
from pipar_jax.config.paths import shown
from pipar_jax.disk.files import unused
from pipar_jax.errors import ConfigError
from pipar_jax.launch import launcher, machine
from pipar_jax.launch.run_folders import check_place
from pipar_jax.methods.registry import title
from pipar_jax.methods.resolution import resolve
from pipar_jax.report import comparison, write_report
from pipar_jax.report.comparison import Outcome
from pipar_jax.report.progress import ProgressDisplay

#: Width of the output without a terminal, in characters.
PLAIN_WIDTH = 100


def check(config: Config, methods: Sequence[str]) -> None:
    """Checks every method's configuration and this machine before the first run starts.

    Args:
      config: The setting.
      methods: The methods to compare.

    Raises:
      ConfigError: A method does not fit the setting, or this machine lacks what its hosts need or
        cannot have its folder.
    """
    for method in methods:
        try:
            setting = resolve(comparison.setting_of(config, method))
        except ConfigError as error:
            raise ConfigError(f"with method {method} of --methods: {error}") from error
        machine.check(setting)
        check_place(setting)


def compare(config: Config, methods: Sequence[str], console: Console) -> list[Outcome]:
    """Trains by each method, prints the table and writes the report.

    The report is ``NAME.html`` in the folder of all runs, with the name of the configuration. If it
    is taken, a number is appended, as to the folders of runs. If a run fails or is interrupted, the
    methods before it have their table and report all the same.

    Args:
      config: The setting, which ``check`` has accepted for all methods.
      methods: The methods, in the order in which they run.
      console: Where results are printed; progress goes to standard error.

    Returns:
      The results, in the order of ``methods``.

    Raises:
      PiparError: A run failed, or the report cannot be written.
    """
    began_s = time.monotonic()
    outcomes: list[Outcome] = []
    try:
        for number, method in enumerate(methods, start=1):
            head = f"{number}/{len(methods)} {title(method)}"
            with ProgressDisplay(head) as progress:
                outcome = comparison.run_method(config, method, launcher.launch, progress)
            outcomes.append(outcome)
            console.print(
                f"{head}: {outcome.epoch_s:.2f} s per epoch, test {outcome.task['main']} "
                f"{outcome.score_text}",
                markup=False,
                soft_wrap=True,
            )
    except BaseException:
        if outcomes:
            with contextlib.suppress(Exception):  # what ended the comparison is told, not this
                _conclude(config, outcomes, console, f"{len(outcomes)} of {len(methods)} methods")
        raise
    _conclude(config, outcomes, console, f"Finished in {time.monotonic() - began_s:.0f} s")
    return outcomes


def _conclude(config: Config, outcomes: Sequence[Outcome], console: Console, head: str) -> None:
    """Prints the table and writes the report of the methods that have been trained.

    Args:
      config: The setting.
      outcomes: Their results.
      console: Where to print.
      head: How far the comparison has come.

    Raises:
      PiparError: The report cannot be written.
    """
    console.print()
    console.print(comparison.make_table(outcomes), markup=False)
    console.print(comparison.conclude(outcomes), markup=False, soft_wrap=True)
    report = unused(config.run.dir, config.name, ".html")
    write_report([Path(outcome.folder) for outcome in outcomes], report)
    console.print(
        f"{head}. Open {shown(report)} in a browser; the runs are in "
        f"{', '.join(shown(outcome.folder) for outcome in outcomes)}.",
        markup=False,
        soft_wrap=True,
    )
