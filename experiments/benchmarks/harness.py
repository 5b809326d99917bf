"""The benchmark harness, with which every ``experiments.bench_*`` measures and reports.

A benchmark is a function that takes a ``Bench``; its module ends in ``harness.run``, which adds
``--quick`` and ``--json=FILE``, prints the table and ends with exit code 0, whether targets were
met or not; only without any figure it is an error::

    \"\"\"How long a sort takes beside the same sort of a shuffled list.\"\"\"

    from experiments.benchmarks import harness


    def measure(run: harness.Bench) -> None:
        size = 10_000 if run.quick else 1_000_000
        up, down = range(size), range(size, 0, -1)
        cases = {"sorted": lambda: sorted(up), "reversed": lambda: sorted(down)}
        samples = run.compare(cases, repeats=9)
        run.row("sorted", samples.median("sorted") * 1e3, "ms", spread=samples.spread("sorted"))
        run.row("reversed / sorted", samples.ratio("reversed", "sorted"), "x", target=1.5)
        run.note("Sorting a sorted list is not free either.")


    if __name__ == "__main__":
        harness.run(measure)

Timings end when the result is ready (``block_until_ready``) and exclude the first calls, which
compile. A case that times itself, such as a whole training run in processes, returns
``harness.Seconds``. Machines are noisy: cases alternate, their order reversed every other time, and
a ratio is the median of the ratios of neighbouring runs. ``pipar_jax.launch.pinning`` runs a case
on chosen cores. The harness itself needs no jax.
"""

from __future__ import annotations

import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from statistics import median, quantiles
from typing import Any, Literal, TypeVar

from absl import flags
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipar_jax.disk.files import check_target, write_text
from pipar_jax.disk.json_text import dumps
from pipar_jax.errors import ConfigError, RunError
from pipar_jax.launch import plain_flags
from pipar_jax.report.console import make_console

# Maximum number of runs of each case with --quick.
QUICK_REPEATS = 3
# Minimum interval of progress lines without a terminal.
PLAIN_PROGRESS_S = 10.0
# Width of a table without a terminal.
PLAIN_WIDTH = 110

Better = Literal["lower", "higher"]
T = TypeVar("T")


class Seconds(float):
    """The result of a case that times itself."""


@dataclass(frozen=True)
class Row:
    """One figure of the report; ``met`` is None where there is no target."""

    name: str
    value: float
    unit: str
    target: float | None
    better: Better
    met: bool | None


class Samples:
    """The seconds of each case, in the order of runs: the i-th runs of all are neighbours."""

    def __init__(self, seconds: Mapping[str, list[float]]) -> None:
        self.seconds = dict(seconds)

    def median(self, case: str) -> float:
        """Returns the median of the seconds of ``case``."""
        return median(self.seconds[case])

    def minimum(self, case: str) -> float:
        """Returns the minimum of the seconds of ``case``, which other work affects least."""
        return min(self.seconds[case])

    def spread(self, case: str) -> float:
        """Returns the distance between the quartiles of ``case`` as a share of its median."""
        values = self.seconds[case]
        if len(values) < 2:
            return 0.0
        low, _, high = quantiles(values, n=4, method="inclusive")
        return (high - low) / median(values)

    def ratio(self, case: str, other: str) -> float:
        """Returns the median of ``case`` / ``other`` over neighbouring runs."""
        pairs = zip(self.seconds[case], self.seconds[other], strict=True)
        return median(mine / theirs for mine, theirs in pairs)


class Bench:
    """A running benchmark: runs cases, shows progress, and collects rows.

    Args:
      title: Title in one line.
      quick: Whether to keep the whole benchmark under a minute.
      json_path: File to which ``finish`` writes the rows, or None.
      console: Console of the report; by default standard output.

    Attributes:
      rows: The figures so far.
      notes: The lines below the table so far.

    Raises:
      ConfigError: ``json_path`` cannot be written.
    """

    def __init__(
        self,
        title: str,
        *,
        quick: bool = False,
        json_path: str | os.PathLike[str] | None = None,
        console: Console | None = None,
    ) -> None:
        self.title = title
        self.quick = quick
        self.rows: list[Row] = []
        self._spreads: list[float | None] = []
        self.notes: list[str] = []
        self._json_path = Path(json_path) if json_path is not None else None
        if self._json_path is not None:  # reported immediately, not after half an hour of measuring
            check_target(self._json_path, f"--json={self._json_path}")
        self._console = console or make_console(PLAIN_WIDTH)
        self._progress = _ProgressLine()
        self._began_s = time.monotonic()

    def compare(
        self,
        cases: Mapping[str, Callable[[], object]],
        *,
        repeats: int = 7,
        warm_up: int = 1,
    ) -> Samples:
        """Runs ``cases`` alternately and returns their seconds.

        Args:
          cases: Functions by name. A case that returns ``Seconds`` times itself.
          repeats: Number of timed runs of each case; at most ``QUICK_REPEATS`` with ``--quick``.
          warm_up: Number of untimed runs of each case before, which compile.
        """
        repeats = min(repeats, QUICK_REPEATS) if self.quick else repeats
        seconds: dict[str, list[float]] = {name: [] for name in cases}
        total = (warm_up + repeats) * len(cases)
        done = 0
        began_s = time.monotonic()
        for turn in range(-warm_up, repeats):
            # Forth and back, so that a change of the machine's speed favours neither end.
            order = list(cases) if turn % 2 == 0 else list(cases)[::-1]
            for name in order:
                left_s = (time.monotonic() - began_s) / done * (total - done) if done else None
                self.progress(f"{name}{' (warm-up)' if turn < 0 else ''}", done, total, left_s)
                elapsed_s = _time_once(cases[name])
                if turn >= 0:
                    seconds[name].append(elapsed_s)
                done += 1
        self._progress.clear()
        return Samples(seconds)

    def reduced(self, flag: flags.FlagHolder[T], quick: T) -> T:
        """Returns a flag's value; with ``--quick`` another one, unless the flag was given.

        Args:
          flag: The flag, as its definition returned it.
          quick: What the benchmark takes less than a minute with.
        """
        value: T = quick if self.quick and not flag.present else flag.value
        return value

    def progress(
        self,
        text: str,
        done: int | None = None,
        total: int | None = None,
        left_s: float | None = None,
    ) -> None:
        """Shows progress on one line: in place on a terminal, occasionally elsewhere."""
        parts = [text]
        if done is not None and total is not None:
            parts.insert(0, f"{done}/{total}")
        if left_s is not None:
            parts.append(f"about {left_s:.0f} s left")
        self._progress.show(f"{self.title}: {' · '.join(parts)}")

    def row(
        self,
        name: str,
        value: float,
        unit: str,
        target: float | None = None,
        better: Better = "lower",
        *,
        spread: float | None = None,
    ) -> Row:
        """Adds a figure to the report, and whether it meets its ``target``, if any.

        Args:
          name: Unique name of the figure.
          value: The figure, in ``unit``.
          unit: Its unit: "s", "ms", "GB/s", "x" for a ratio, "%", …
          target: Target value.
          better: Whether lower or higher figures are better.
          spread: Distance between its quartiles as a share of its median, only for the table.

        Raises:
          RunError: A row with that name already exists.
        """
        if any(row.name == name for row in self.rows):
            raise RunError(f"the benchmark reports {name!r} twice; give each row its own name")
        met = None
        if target is not None:
            met = bool(value <= target if better == "lower" else value >= target)
        goal = None if target is None else float(target)
        self.rows.append(Row(name, float(value), unit, goal, better, met))
        self._spreads.append(spread)
        return self.rows[-1]

    def note(self, text: str) -> None:
        """Adds a line below the table."""
        self.notes.append(text)

    def missing(self, text: str) -> None:
        """Tells at once, and below the table, what is not measured for want of something."""
        self._progress.clear()
        self._console.print(text, markup=False, highlight=False)
        self.note(text)

    def finish(self, *, complete: bool = True) -> None:
        """Writes the rows as JSON, if a file was named, and prints the table.

        Args:
          complete: Whether all was measured. Otherwise the file that was named stays as it is, and
            the rows go to NAME.partial.json beside it.
        """
        self._progress.clear()
        try:
            # First: nothing that becomes of the output may cost the rows.
            partial = self._write(complete=complete)
        finally:
            self._print()
        if partial is not None:
            self._console.print(f"the rows so far are in {partial}", markup=False, soft_wrap=True)

    def _write(self, *, complete: bool) -> Path | None:
        """Writes the rows to the file that was named; returns the one beside it, if it is that."""
        if self._json_path is None:
            return None
        target = self._json_path
        # What is no file, such as /dev/stdout, has nothing that could be replaced.
        if not complete and (os.path.isfile(target) or not os.path.exists(target)):
            target = target.with_name(f"{target.stem}.partial.json")
        rows = [asdict(row) for row in self.rows]
        for row in rows:  # JSON has neither NaN nor infinity
            row["value"] = row["value"] if math.isfinite(row["value"]) else None
        write_text(target, dumps(rows, indent=1) + "\n", "choose another file with --json")
        return None if complete else target

    def _print(self) -> None:
        """Prints the table and what is said below it."""
        self._console.print(self._table(), markup=False)
        for text in self.notes:
            self._console.print(text, markup=False)
        judged = [row.met for row in self.rows if row.met is not None]
        met = f"{sum(judged)} of {len(judged)} targets met; " if judged else ""
        self._console.print(f"{met}took {time.monotonic() - self._began_s:.0f} s", markup=False)
        self._console.print(f"on {describe_machine()}", markup=False)

    def _table(self) -> Table:
        title = Text(self.title + (" (--quick)" if self.quick else ""), "table.title")
        table = Table(title=title, title_justify="left")
        with_spread = any(spread is not None for spread in self._spreads)
        table.add_column("figure", overflow="fold")
        table.add_column("value", justify="right", no_wrap=True)
        if with_spread:
            table.add_column("spread", justify="right", no_wrap=True)
        table.add_column("target", justify="right", no_wrap=True)
        table.add_column("value / target", justify="right", no_wrap=True)
        table.add_column("", no_wrap=True)
        for row, spread in zip(self.rows, self._spreads, strict=True):
            cells: list[str | Text] = [row.name, f"{_digits(row.value)} {row.unit}"]
            if with_spread:
                cells.append("" if spread is None else f"{spread:.0%}")
            if row.target is None:
                cells += ["", "", ""]
            else:
                sign = "≤" if row.better == "lower" else "≥"
                ratio = f"{row.value / row.target:.2f}" if row.target else ""
                verdict = Text("met", "green") if row.met else Text("missed", "bold red")
                cells += [f"{sign} {_digits(row.target)} {row.unit}", ratio, verdict]
            table.add_row(*cells)
        return table


class _ProgressLine:
    """One line on standard error, in place on a terminal, at long intervals elsewhere."""

    def __init__(self) -> None:
        self._in_place = sys.stderr.isatty()
        self._printed_s = float("-inf")

    def show(self, text: str) -> None:
        if self._in_place:
            width = os.get_terminal_size(sys.stderr.fileno()).columns
            print(f"\r\x1b[2K{text[: width - 1]}", end="", file=sys.stderr, flush=True)
        elif time.monotonic() - self._printed_s >= PLAIN_PROGRESS_S:
            self._printed_s = time.monotonic()
            print(text, file=sys.stderr, flush=True)

    def clear(self) -> None:
        if self._in_place:
            print("\r\x1b[2K", end="", file=sys.stderr, flush=True)


def run(measure: Callable[[Bench], None], title: str | None = None) -> None:
    """Runs a benchmark as a program with ``--quick`` and ``--json=FILE``, and exit.

    Args:
      measure: Measures, and adds rows to its ``Bench``.
      title: Title; by default the first line of the main module's docstring.
    """
    quick = flags.DEFINE_boolean(
        "quick", False,
        "Take less than a minute, with coarser figures; what other flags ask for is measured all "
        "the same.",
    )  # fmt: skip
    json_path = plain_flags.define_path("json", None, "Also write the rows to this file, as JSON.")

    def main(_: list[str]) -> None:
        docstring = (sys.modules["__main__"].__doc__ or "benchmark").strip()
        name = title or docstring.splitlines()[0].rstrip(".")
        bench = Bench(name, quick=quick.value, json_path=json_path.value)
        try:
            measure(bench)
        except BaseException:
            # Measurements so far are expensive and not discarded.
            if bench.rows:
                bench.note("Incomplete: interrupted before all was measured.")
                bench.finish(complete=False)
            raise
        if not bench.rows:  # a file that was named stays as it is
            why = "; ".join(bench.notes) or "the flags leave no part of it"
            raise ConfigError(f"nothing was measured: {why}")
        bench.finish()

    plain_flags.run(main)


def chosen(settings: Iterable[T], only: str, name_of: Callable[[T], str]) -> list[T]:
    """Returns the settings that ``--only`` selects.

    Args:
      settings: All settings, at least one.
      only: What their names contain; empty: any.
      name_of: Returns the name of a setting.

    Raises:
      ConfigError: There is none.
    """
    names = {name_of(setting): setting for setting in settings}
    if found := [setting for name, setting in names.items() if only in name]:
        return found
    raise ConfigError(f"--only={only!r} is in the name of no setting: there are {', '.join(names)}")


def kept(results: Path, name: str, measure: Callable[[], Any]) -> Any:
    """Returns the saved measurement of a name, or measures and saves it.

    Measurements are saved immediately, so that a long benchmark can be continued.

    Args:
      results: The folder.
      name: The name.
      measure: Measures, and returns values for JSON.
    """
    path = results / f"{name.replace(' ', '_').replace('/', '-')}.json"
    if not path.exists():
        write_text(path, dumps(measure()), "choose another folder with --results")
    return json.loads(path.read_text(encoding="utf-8"))


def describe_machine(libraries: Iterable[str] = ("jax", "flax", "numpy")) -> str:
    """Returns one line about this machine: system, usable cores, Python and libraries."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in libraries)
    return (
        f"{platform.system()} {platform.machine()}, {cores} cores, "
        f"Python {platform.python_version()}, {versions}"
    )


def _time_once(case: Callable[[], object]) -> float:
    """Returns the seconds of one call until its result is ready, or its own measurement."""
    began_s = time.perf_counter()
    result = case()
    if isinstance(result, Seconds):
        return float(result)
    _wait(result)
    return time.perf_counter() - began_s


def _wait(result: object) -> None:
    """Waits for all arrays in nested tuples, lists and dicts, since dispatch is asynchronous."""
    if hasattr(result, "block_until_ready"):
        result.block_until_ready()
    elif isinstance(result, tuple | list):
        for item in result:
            _wait(item)
    elif isinstance(result, dict):
        for item in result.values():
            _wait(item)


def _digits(value: float) -> str:
    """Returns ``value`` with four significant digits, without an exponent up to a billion."""
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e9 else f"{value:.4g}"
