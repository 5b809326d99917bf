"""Compares methods on the same data from the same initial weights.

Only the method differs between the runs: seed, shards, model, links and slowdowns come from one
configuration.
"""

from __future__ import annotations

import dataclasses
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from pipar_jax.config import Config
from pipar_jax.config.schema import did_you_mean
from pipar_jax.disk.event_log import OnEvent, score_of
from pipar_jax.disk.json_text import JsonObject
from pipar_jax.errors import ConfigError
from pipar_jax.methods.registry import METHODS, server_methods, title
from pipar_jax.methods.resolution import resolve
from pipar_jax.report.scores import score_text
from pipar_jax.schedule.plan import COORDINATOR, is_node

Launch = Callable[..., JsonObject]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The results of one method.

    Attributes:
      method: Name of the method in the configuration.
      plan: The chain of its plan, in one short line.
      epoch_s: Median seconds of an epoch, without evaluation and compilation.
      task: What the runs' task measures, as in the event ``run_started``.
      score: The task's main score on the test set with the final weights; None: not finite.
      server_idle: Share of the rounds in which the server computed nothing, in [0, 1].
      device_idle: Mean over the devices of the same share.
      up_bytes: Bytes sent from devices to the server in the whole run.
      down_bytes: Bytes sent from the server to devices in the whole run.
      folder: Folder of the run.
    """

    method: str
    plan: str
    epoch_s: float
    task: Mapping[str, Any]
    score: float | None
    server_idle: float
    device_idle: float
    up_bytes: int
    down_bytes: int
    folder: str

    @property
    def title(self) -> str:
        """The name of the method as it is written in the literature."""
        return title(self.method)

    @property
    def score_text(self) -> str:
        """The main score as text."""
        return score_text(self.task, self.task["main"], self.score)


def choose_methods(config: Config, text: str) -> list[str]:
    """Returns the methods to compare.

    Args:
      config: The setting.
      text: Names of methods separated by commas. If it is empty, fl, sl, sfl, pipar and the
        configuration's own are chosen, as far as they fit the configuration.

    Raises:
      ConfigError: A name is not a method, or no method fits.
    """
    if text.strip():
        return parse_methods(text)
    candidates = dict.fromkeys((*server_methods(), config.method))
    fitting = [method for method in candidates if method in METHODS and _fits(config, method)]
    if not fitting:
        raise ConfigError(
            "none of the methods that are compared by default fits this configuration: choose "
            f"with --methods=NAME,NAME (known: {', '.join(METHODS)})"
        )
    return fitting


def _fits(config: Config, method: str) -> bool:
    """Returns whether the configuration is valid with a method."""
    try:
        resolve(dataclasses.replace(config, method=method))
    except ConfigError:
        return False
    return True


def parse_methods(text: str) -> list[str]:
    """Returns the methods named in ``text``, separated by commas, each once.

    Raises:
      ConfigError: A name is not a method, or none is given.
    """
    known = f"known: {', '.join(METHODS)}"
    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    for name in names:
        if name not in METHODS:
            near = did_you_mean(name, METHODS)
            raise ConfigError(f"--methods={text}: {name!r} is not a method{near} ({known})")
    if not names:
        raise ConfigError(f"--methods={text!r} names no method ({known})")
    return names


def setting_of(config: Config, method: str) -> Config:
    """Returns the configuration of one run of a comparison, with its own method and name."""
    return dataclasses.replace(config, method=method, name=f"{config.name}-{method}")


def run_method(config: Config, method: str, launch: Launch, on_event: OnEvent) -> Outcome:
    """Trains by ``method`` and returns the results.

    Args:
      config: The setting, whose own method is replaced.
      method: The method, one of ``METHODS``.
      launch: ``launcher.launch``, or a function with its interface.
      on_event: Called with each event of the run as it happens.

    Raises:
      PiparError: The run failed.
    """
    plan = ""

    def follow(event: JsonObject) -> None:
        nonlocal plan
        if event["event"] == "run_started":
            plan = event["plan"]
        on_event(event)

    summary = launch(setting_of(config, method), on_event=follow)
    idle = summary["idle"]
    devices = [share for host, share in idle.items() if host != COORDINATOR and not is_node(host)]
    return Outcome(
        method=method,
        plan=_shorten(plan),
        epoch_s=summary["epoch_seconds"],
        task=summary["task"],
        score=score_of(summary, summary["task"]["main"]),
        server_idle=idle[COORDINATOR],
        device_idle=statistics.fmean(devices),
        up_bytes=summary["bytes_up"],
        down_bytes=summary["bytes_down"],
        folder=summary["folder"],
    )


def _shorten(plan: str) -> str:
    """Returns the chain in the text of a plan, without the number of devices."""
    chain, _, rest = plan.partition(";")
    return re.sub(r"^\d+ of ", "", chain) + (", in turn" if "sequential" in rest else "")


def make_table(outcomes: Sequence[Outcome]) -> Table:
    """Returns the table of results, the fastest method in bold; speed-ups are over ``baseline``."""
    base = baseline(outcomes)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("method", no_wrap=True)
    table.add_column("plan", overflow="fold")
    for name in (
        "seconds\nper epoch",
        f"speed-up\nover {base.title}",
        "server\nidle",
        "devices\nidle",
        "MB up",
        "MB down",
        f"test\n{base.task['main']}",
    ):
        table.add_column(name, justify="right", no_wrap=True)
    fastest = min(outcomes, key=lambda outcome: outcome.epoch_s)
    for outcome in outcomes:
        table.add_row(
            outcome.title,
            Text(outcome.plan),
            f"{outcome.epoch_s:.2f}",
            f"{base.epoch_s / outcome.epoch_s:.2f}x",
            f"{outcome.server_idle:.0%}",
            f"{outcome.device_idle:.0%}",
            f"{outcome.up_bytes / 1e6:.2f}",
            f"{outcome.down_bytes / 1e6:.2f}",
            outcome.score_text,
            style="bold" if outcome is fastest else None,
        )
    return table


def baseline(outcomes: Sequence[Outcome]) -> Outcome:
    """Returns the outcome that speed-ups refer to: that of FL, or the first if FL did not run."""
    return next((outcome for outcome in outcomes if outcome.method == "fl"), outcomes[0])


def conclude(outcomes: Sequence[Outcome]) -> str:
    """Returns one sentence that sums up the results."""
    fastest = min(outcomes, key=lambda outcome: outcome.epoch_s)
    base = baseline(outcomes)
    metric = base.task["main"]
    known = [outcome for outcome in outcomes if outcome.score is not None]
    if not known:
        spread = f"test {metric} is not finite"
    else:
        low, high = (pick(known, key=lambda outcome: outcome.score or 0.0) for pick in (min, max))
        if low.score == high.score:
            spread = f"all reach the same test {metric}, {high.score_text}"
        else:
            spread = f"test {metric} lies between {low.score_text} and {high.score_text}"
    if fastest is base:
        return f"{base.title} is the fastest here; {spread}."
    return (
        f"{fastest.title} is the fastest here, {base.epoch_s / fastest.epoch_s:.1f} times as fast "
        f"as {base.title}; {spread}."
    )
