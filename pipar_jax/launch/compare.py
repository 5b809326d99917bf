"""Trains one setting by several methods, one after another, and compares the results."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from pipar_jax.config import Config
from pipar_jax.config.paths import shown
from pipar_jax.disk.files import unused
from pipar_jax.launch import launcher, machine
from pipar_jax.launch.run_folders import check_place
from pipar_jax.methods.registry import title
from pipar_jax.methods.resolution import resolve
from pipar_jax.report import comparison, write_report
from pipar_jax.report.comparison import Outcome
from pipar_jax.report.progress import ProgressDisplay

#: Width of the output without a terminal, in characters.
PLAIN_WIDTH = 100


def make_console() -> Console:
    """Returns the console for the table: as wide as the terminal, or ``PLAIN_WIDTH``."""
    return Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH, highlight=False)


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
        setting = resolve(comparison.setting_of(config, method))
        machine.check(setting)
        check_place(setting)


def compare(config: Config, methods: Sequence[str], console: Console) -> list[Outcome]:
    """Trains by each method, prints the table and writes the report.

    The report is ``NAME.html`` in the folder of all runs, with the name of the configuration. If it
    is taken, a number is appended, as to the folders of runs.

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
    for number, method in enumerate(methods, start=1):
        head = f"{number}/{len(methods)} {title(method)}"
        with ProgressDisplay(head) as progress:
            outcome = comparison.run_method(config, method, launcher.launch, progress)
        outcomes.append(outcome)
        console.print(
            f"{head}: {outcome.epoch_s:.2f} s per epoch, test {outcome.task['main']} "
            f"{outcome.score_text}"
        )
    console.print()
    console.print(comparison.make_table(outcomes))
    console.print(comparison.conclude(outcomes))
    report = unused(config.run.dir, config.name, ".html")
    write_report([Path(outcome.folder) for outcome in outcomes], report)
    console.print(
        f"Finished in {time.monotonic() - began_s:.0f} s. Open {shown(report)} in a browser; the "
        f"runs are in {', '.join(shown(outcome.folder) for outcome in outcomes)}."
    )
    return outcomes
