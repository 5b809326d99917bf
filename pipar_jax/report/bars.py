"""Stacked horizontal bars: the seconds of an epoch by cause, the bytes of a run by kind."""

from __future__ import annotations

import html
import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

from pipar_jax.report.idle import CAUSES
from pipar_jax.report.run import RecordedRun, hosts_of, links_of
from pipar_jax.report.svg import digits, drawing, element, legend, text, tick_labels, ticks
from pipar_jax.schedule.plan import COORDINATOR, is_device, is_node

BUSY = "busy"
#: Letters of a label that are shown, from its end, which tells links and hosts of a run apart.
MOST_LETTERS = 50
#: The names of the causes on the page.
CAUSE_NAMES = {
    BUSY: "computing", "data": "waiting for data", "device": "for a device",
    "server": "for the server", "network": "for the network", "aggregation": "for aggregation",
    "other": "other",
}  # fmt: skip
KINDS = ("activations", "cotangents", "weights")
KIND_NAMES = ("activations", "cotangents", "weights, labels, control")


class Bar(NamedTuple):
    """One stacked bar.

    Attributes:
      label: The text in front of it.
      parts: For each part a class of the style sheet and a value.
      note: The text behind it.
      first: Whether it begins a group.
    """

    label: str
    parts: Sequence[tuple[str, float]]
    note: str = ""
    first: bool = False


def stacked_bars(title: str, unit: str, bars: Sequence[Bar], names: Callable[[str], str]) -> str:
    """Returns a chart of stacked bars.

    Args:
      title: Title of the chart.
      unit: Unit of the values.
      bars: The bars, from top to bottom.
      names: Maps the class of a part to its name.
    """
    longest = max((sum(value for _, value in bar.parts) for bar in bars), default=0.0)
    if longest <= 0:
        return ""
    left = 16.0 + 7.2 * min(max(len(bar.label) for bar in bars), MOST_LETTERS)
    right, width, height = 150.0, 900.0, 16.0
    scale = (width - left - right) / longest
    content, top = [text(8, 16, title, "chart-title")], 30.0
    marks = []
    for bar in bars:
        top += 10 if bar.first else 0
        content.append(text(left - 8, top + 12, _shortened(bar.label), "label", "end"))
        x = left
        for kind, value in bar.parts:
            if value * scale < 0.05:
                continue
            note = f"{bar.label}, {names(kind)}: {digits(value)} {unit}"
            content.append(
                element("rect", element("title", html.escape(note)), x=x, y=top,
                        width=value * scale, height=height, class_=f"part {kind}")
            )  # fmt: skip
            x += value * scale
        content.append(text(x + 8, top + 12, bar.note, "tick"))
        top += height + 5
    stations = ticks(0, longest, 6)
    for value, label in zip(stations, tick_labels(stations), strict=True):
        x = left + value * scale
        marks.append(element("line", x1=x, x2=x, y1=26, y2=top, class_="grid"))
        marks.append(text(x, top + 13, label, "tick", "middle"))
    content.append(text(left + (width - left - right) / 2, top + 30, unit, "label", "middle"))
    return drawing(width, top + 38, "".join(marks + content), title)


def _shortened(label: str) -> str:
    """Returns a label of at most ``MOST_LETTERS``."""
    return label if len(label) <= MOST_LETTERS else f"…{label[1 - MOST_LETTERS :]}"


def idle_bars(runs: Sequence[RecordedRun], names: Sequence[str]) -> str:
    """Returns the chart of an epoch's seconds on the server, nodes and devices of each run.

    Args:
      runs: The runs.
      names: The label of each run.
    """
    bars = []
    for run, name in zip(runs, names, strict=True):
        devices = run.devices
        groups = [(COORDINATOR, [COORDINATOR]), ("devices" if len(devices) > 1 else "device",
                                                 devices)]  # fmt: skip
        groups[1:1] = [(node, [node]) for node in hosts_of(run) if is_node(node)]
        for position, (label, hosts) in enumerate(groups):
            parts = _shares(run, hosts)
            if parts is None:
                continue
            idle = sum(share for kind, share in parts if kind != BUSY)
            seconds = [(kind, share * run.epoch_s) for kind, share in parts]
            bars.append(Bar(f"{name} {label}", seconds, f"idle {idle:.0%}", not position))
    chart = stacked_bars("Time per epoch", "seconds per epoch", bars, CAUSE_NAMES.__getitem__)
    entries = [(kind, CAUSE_NAMES[kind]) for kind in (BUSY, *CAUSES)]
    return legend(entries) + chart if chart else ""


def byte_bars(runs: Sequence[RecordedRun], names: Sequence[str]) -> str:
    """Returns the chart of the bytes that each direction of each link carried in all rounds.

    Args:
      runs: The runs.
      names: The label of each run.
    """
    bars = []
    for run, name in zip(runs, names, strict=True):
        # Without knowing what was activations, a bar would call all of it weights.
        for position, ends in enumerate(links_of(run) if run.knows_carriers else ()):
            sums = run.carried.get(ends, {})
            parts = [(kind, sums.get(kind, 0.0) / 1e6) for kind in KINDS[:2]]
            rest = run.traffic[ends]["bytes"] - sum(sums.values())
            parts.append((KINDS[2], max(rest, 0.0) / 1e6))
            total = sum(value for _, value in parts)
            label = f"{name} {ends[0]} → {ends[1]}"
            bars.append(Bar(label, parts, f"{digits(total)} MB", not position))
    named = dict(zip(KINDS, KIND_NAMES, strict=True))
    chart = stacked_bars("Traffic by link", "megabytes", bars, named.__getitem__)
    return legend(list(named.items())) + chart if chart else ""


def _shares(run: RecordedRun, hosts: Sequence[str]) -> list[tuple[str, float]] | None:
    """Returns the shares of the rounds spent computing and waiting, averaged over hosts."""
    shares = [run.idle_share(host) for host in hosts]
    idle = [share for share in shares if share is not None]
    if not idle:
        return None
    total = statistics.fmean(idle)
    parts = [(BUSY, 1.0 - total)]
    # Of devices a trace has the places, which are less than those that had them.
    known = [
        causes for host, causes in run.causes.items()
        if host in hosts or (is_device(host) and is_device(hosts[0]))
    ]  # fmt: skip
    sums = {cause: sum(causes[cause] for causes in known) for cause in CAUSES}
    whole = sum(sums.values())
    if not whole:
        return [*parts, ("other", total)]
    return [*parts, *((cause, total * value / whole) for cause, value in sums.items())]
