"""One step as a Gantt chart: the computations and sends of each host, coloured by micro-batch."""

from __future__ import annotations

import contextlib
import html
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from pipar_jax.errors import PlanError
from pipar_jax.report.run import MOST_DEVICES, RecordedRun, hosts_of
from pipar_jax.report.svg import HUES, digits, drawing, element, legend, text, tick_labels, ticks
from pipar_jax.schedule.actions import (
    AGGREGATE,
    BACKWARD,
    COMPUTE,
    FORWARD,
    KIND_NAMES,
    LOSS,
    MICRO,
    SEND_BACKWARD,
    SEND_CLIENT_MODEL,
    SEND_FORWARD,
    UPDATE,
)
from pipar_jax.schedule.trace import Interval, Timed, Trace

WIDTH, LEFT, LANE, THIN, GAP = 900.0, 64.0, 20.0, 8.0, 10.0
#: What is drawn, in the order of the legend.
_DRAWN = (
    FORWARD,
    BACKWARD,
    LOSS,
    UPDATE,
    AGGREGATE,
    SEND_CLIENT_MODEL,
    SEND_FORWARD,
    SEND_BACKWARD,
)
_SENDS = (SEND_FORWARD, SEND_BACKWARD)
#: Kinds in the darker shade of their micro-batch's colour.
_DARK = (BACKWARD, SEND_BACKWARD)


class Window(NamedTuple):
    """The interval that a chart shows.

    Attributes:
      device: The device whose step defines the interval.
      step: The index of that step.
      interval: From the first computation of the step to the last.
    """

    device: int
    step: int
    interval: Interval


def median_step(trace: Trace) -> Window | None:
    """Returns the step of median duration of the first device, in the last round.

    The first and the last step of the round are left out if there are others.
    """
    if not trace.rounds:
        return None
    last = trace.rounds[-1]
    spans: dict[int, list[float]] = {}
    for _, row in trace.rows():
        inside = row.start_s >= last.start_s - 1e-6 and row.end_s <= last.end_s + 1e-6
        if inside and row.action.device == 0 and row.action.kind in COMPUTE:
            ends = spans.setdefault(row.action.step, [row.start_s, row.end_s])
            ends[0], ends[1] = min(ends[0], row.start_s), max(ends[1], row.end_s)
    if not spans:
        return None
    steps = sorted(spans)
    if len(steps) > 2:
        steps = steps[1:-1]  # the last may be smaller, and waits for the average
    length = statistics.median_low(spans[step][1] - spans[step][0] for step in steps)
    step = next(s for s in steps if spans[s][1] - spans[s][0] == length)
    return Window(0, step, Interval(*spans[step]))


def gantt_charts(run: RecordedRun, label: str) -> str:
    """Returns the charts of a run's median step, measured and predicted, on one scale.

    Without a trace there is no chart; with an incomplete trace there is no predicted one.

    Args:
      run: The run.
      label: What it is called.
    """
    traces = {"measured": run.digest.last}
    with contextlib.suppress(PlanError):  # the table of predictions says why
        if predicted := run.predict():
            traces["predicted"] = predicted.trace
    windows = {name: median_step(trace) for name, trace in traces.items()}
    longest_s = max((window.interval.seconds for window in windows.values() if window), default=0.0)
    return "".join(
        _chart(run, traces[name], window, f"{label}, {name}", longest_s)
        for name, window in windows.items()
        if window is not None
    )


def actions_legend(runs: Sequence[RecordedRun]) -> str:
    """Returns the legend of the charts: the kinds of action in the runs' last rounds.

    Args:
      runs: The runs whose charts it explains.
    """
    seen = {row.action.kind for run in runs for _, row in run.digest.last.rows()}
    entries = [
        (
            f"{_classes(kind)} {'thin' if kind in _SENDS else 'wide'}",
            KIND_NAMES[kind],
            "" if kind in _SENDS else kind,
        )
        for kind in _DRAWN
        if kind in seen
    ]
    return legend([*entries, ("hue0 wide beside", "another step", "")]) if entries else ""


def _chart(run: RecordedRun, trace: Trace, window: Window, name: str, longest_s: float) -> str:
    """Returns one chart, whose width stands for ``longest_s``."""
    hosts = hosts_of(run)
    devices = [host for host in hosts if host.startswith("d")][:MOST_DEVICES]
    shown = [host for host in hosts if host in devices or not host.startswith("d")]
    interval = window.interval
    scale = (WIDTH - LEFT - 12) / longest_s
    parts: list[str] = []
    marks: list[str] = []
    top = 22.0
    for host in shown:
        rows = _inside(trace.hosts.get(host, ()), interval)
        sends = any(row.action.kind in _SENDS for row in rows)
        height = LANE + (THIN + 3 if sends else 0)
        marks.append(text(LEFT - 8, top + LANE / 2 + 4, host, "label", "end"))
        marks.append(element("rect", x=LEFT, y=top, width=WIDTH - LEFT - 12, height=height,
                             class_="lane"))  # fmt: skip
        parts.extend(_bar(row, window, top, scale) for row in rows)
        top += height + GAP
    bottom = top
    stations = ticks(0, longest_s * 1e3, 8)
    for value, label in zip(stations, tick_labels(stations), strict=True):
        x = LEFT + value / 1e3 * scale
        marks.append(element("line", x1=x, x2=x, y1=16, y2=bottom - 4, class_="grid"))
        marks.append(text(x, bottom + 10, label, "tick", "middle"))
    marks.append(text(LEFT + (WIDTH - LEFT) / 2, bottom + 26, "milliseconds", "label", "middle"))
    hidden = sum(host.startswith("d") for host in hosts) - len(devices)
    title = f"{name}: step {window.step} of device {window.device}, {run.plan_text}"
    if hidden:
        title += f" ({hidden} more device{'s' * (hidden > 1)} not shown)"
    marks.append(text(8, 14, title, "chart-title"))
    return drawing(WIDTH, bottom + 32, "".join(marks + parts), f"Gantt chart of {title}")


def _inside(rows: Sequence[Timed], interval: Interval) -> list[Timed]:
    """Returns the computations and sends of a host that overlap an interval."""
    return [
        row
        for row in rows
        if row.action.kind in _DRAWN
        and row.end_s > interval.start_s
        and row.start_s < interval.end_s
    ]


def _bar(row: Timed, window: Window, top: float, scale: float) -> str:
    """Returns the bar of one action, with its figures as a tooltip."""
    action = row.action
    start = max(row.start_s, window.interval.start_s) - window.interval.start_s
    end = min(row.end_s, window.interval.end_s) - window.interval.start_s
    sent = action.kind in _SENDS
    micro = action.kind in MICRO
    faded = action.step != window.step
    classes = f"bar {_classes(action.kind, action.micro_batch)}{' beside' if faded else ''}"
    width = max((end - start) * scale, 0.6)
    x, y = LEFT + start * scale, top + (LANE + 3 if sent else 0)
    height = THIN if sent else LANE
    size = f", {row.nbytes / 1e3:,.1f} kB" if sent else ""
    note = (
        f"{action}: {KIND_NAMES[action.kind]}, {digits((row.end_s - row.start_s) * 1e3)} ms"
        f"{f', {row.samples} samples' if row.samples else ''}{size}"
    )
    shape = element(
        "rect", element("title", html.escape(note)), x=x, y=y, width=width, height=height, rx=2,
        class_=classes,
    )  # fmt: skip
    word = f"{action.kind}{action.micro_batch}" if micro else action.kind
    if not sent and width > 9.0 * len(word):
        tone = "inside deep" if action.kind in _DARK and not faded else "inside"
        shape += text(x + width / 2, y + LANE / 2 + 4, word, tone, "middle")
    key = f"{action.device}.{action.step}.{action.micro_batch}" if micro else ""
    return element("g", shape, data_key=key) if key else shape


def _classes(kind: str, micro_batch: int = 0) -> str:
    """Returns the classes of the style sheet that colour an action."""
    hue = f"hue{micro_batch % HUES}" if kind in MICRO else "other"
    return f"{hue} {'back' if kind in _DARK else 'fore'}"
