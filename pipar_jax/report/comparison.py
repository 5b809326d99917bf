"""Several methods on the same data from the same initial weights, and the table that compares them.

Only the method differs between the runs: seed, shards, model, links and emulated slowness are those
of one configuration.
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

from pipar_jax.config import METHODS, Config
from pipar_jax.config.schema import did_you_mean
from pipar_jax.errors import ConfigError
from pipar_jax.schedule.plan import COORDINATOR

TITLES: Mapping[str, str] = {"fl": "FL", "sl": "SL", "sfl": "SFL", "pipar": "PiPar"}

OnEvent = Callable[[dict[str, Any]], None]
Launch = Callable[..., dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What one method came to.

    Attributes:
      method: Its name in the configuration.
      plan: The chain of its plan, in one short line.
      epoch_s: Median seconds of an epoch, without evaluation and compilation.
      accuracy: Share of the test samples that the final weights classify correctly.
      server_idle: Share of the rounds in which the server computed nothing.
      device_idle: The same, the mean over the devices.
      up_bytes: Sent from devices to the server in the whole run.
      down_bytes: Sent from the server to devices in the whole run.
      folder: Where the run left its files.
    """

    method: str
    plan: str
    epoch_s: float
    accuracy: float
    server_idle: float
    device_idle: float
    up_bytes: int
    down_bytes: int
    folder: str

    @property
    def title(self) -> str:
        """The method's name as the field writes it."""
        return title(self.method)


def title(method: str) -> str:
    """Returns the name of a method as the field writes it."""
    return TITLES.get(method, method)


def parse_methods(text: str) -> list[str]:
    """Returns the methods named in ``text``, separated by commas, each once.

    Raises:
      ConfigError: One is unknown, or none is named.
    """
    known = f"known: {', '.join(METHODS)}"
    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    for name in names:
        if name not in METHODS:
            near = did_you_mean(name, METHODS)
            raise ConfigError(f"--methods={text}: {name!r} is no method{near} ({known})")
    if not names:
        raise ConfigError(f"--methods={text!r} names no method ({known})")
    return names


def run_method(config: Config, method: str, launch: Launch, on_event: OnEvent) -> Outcome:
    """Trains by ``method``, everything else as in ``config``, and returns what it came to.

    Args:
      config: The setting; its own method does not count.
      method: A name of ``METHODS``.
      launch: ``launcher.launch``, or what behaves like it.
      on_event: Takes the events of the run as they happen.

    Raises:
      PiparError: The run failed.
    """
    plan = ""

    def follow(event: dict[str, Any]) -> None:
        nonlocal plan
        if event["event"] == "run_started":
            plan = event["plan"]
        on_event(event)

    setting = dataclasses.replace(config, method=method, name=f"{config.name}-{method}")
    summary = launch(setting, on_event=follow)
    idle = summary["idle"]
    devices = [share for host, share in idle.items() if host != COORDINATOR]
    return Outcome(
        method=method,
        plan=_shorten(plan),
        epoch_s=summary["epoch_seconds"],
        accuracy=summary["accuracy"],
        server_idle=idle[COORDINATOR],
        device_idle=statistics.fmean(devices),
        up_bytes=summary["bytes_up"],
        down_bytes=summary["bytes_down"],
        folder=summary["folder"],
    )


def _shorten(plan: str) -> str:
    """Returns the chain of a plan's line; how many devices share it stands elsewhere."""
    chain, _, rest = plan.partition(";")
    return re.sub(r"^\d+ of ", "", chain) + (", in turn" if "sequential" in rest else "")


def make_table(outcomes: Sequence[Outcome]) -> Table:
    """Returns the table of ``outcomes``, the fastest in bold; see ``baseline`` for speed-ups."""
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
        "test\naccuracy",
    ):
        table.add_column(name, justify="right", no_wrap=True)
    fastest = min(outcomes, key=lambda one: one.epoch_s)
    for one in outcomes:
        table.add_row(
            one.title,
            Text(one.plan),
            f"{one.epoch_s:.2f}",
            f"{base.epoch_s / one.epoch_s:.2f}x",
            f"{one.server_idle:.0%}",
            f"{one.device_idle:.0%}",
            f"{one.up_bytes / 1e6:.2f}",
            f"{one.down_bytes / 1e6:.2f}",
            f"{one.accuracy:.1%}",
            style="bold" if one is fastest else None,
        )
    return table


def baseline(outcomes: Sequence[Outcome]) -> Outcome:
    """Returns the outcome that speed-ups refer to: FL's, or the first where FL was not run."""
    return next((one for one in outcomes if one.method == "fl"), outcomes[0])


def conclude(outcomes: Sequence[Outcome]) -> str:
    """Returns one sentence about what the figures say, whichever way they fell."""
    fastest = min(outcomes, key=lambda one: one.epoch_s)
    base = baseline(outcomes)
    low, high = (pick(one.accuracy for one in outcomes) for pick in (min, max))
    if low == high:
        spread = f"all reach the same test accuracy, {high:.1%}"
    else:
        spread = f"test accuracies lie between {low:.1%} and {high:.1%}"
    if fastest is base:
        return f"{base.title} is the fastest here; {spread}."
    return (
        f"{fastest.title} is the fastest here, {base.epoch_s / fastest.epoch_s:.1f} times as fast "
        f"as {base.title}; {spread}."
    )
