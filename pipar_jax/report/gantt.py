"""One step as a Gantt chart: what each host computes and sends, micro-batches in colours."""

from __future__ import annotations

import contextlib
import html
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from pipar_jax.errors import PlanError
from pipar_jax.report.run import MOST_DEVICES, Run, hosts_of
from pipar_jax.report.svg import HUES, digits, drawing, element, text, ticks
from pipar_jax.schedule.actions import BACKWARD, COMPUTE, FORWARD, LOSS, SEND_BACKWARD, SEND_FORWARD
from pipar_jax.schedule.trace import Interval, Timed, Trace

WIDTH, LEFT, LANE, THIN, GAP = 900.0, 64.0, 20.0, 8.0, 10.0
_NAMES = {
    FORWARD: "forward", BACKWARD: "backward", LOSS: "forward, loss and backward", "U": "update",
    "A": "average", "H": "hand on", SEND_FORWARD: "activation sent",
    SEND_BACKWARD: "cotangent sent",
}  # fmt: skip


class Window(NamedTuple):
    """The stretch of time that is drawn.

    Attributes:
      device: Whose step.
      step: Which.
      interval: From its first action to its last.
    """

    device: int
    step: int
    interval: Interval


def median_step(trace: Trace) -> Window | None:
    """Returns the step of the first device that lasted as long as its steps usually do.

    Steps of the last round are looked at, but not its first one if there are others.
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


def gantt_charts(run: Run) -> str:
    """Returns the charts of a run's usual step, measured and predicted, in one scale.

    There is nothing to draw if the run kept no trace, and no prediction if its trace is incomplete.
    """
    traces = {"measured": run.digest.last}
    with contextlib.suppress(PlanError):  # the table of predictions says why
        if found := run.predict():
            traces["predicted"] = found.trace
    windows = {name: median_step(trace) for name, trace in traces.items()}
    longest_s = max((one.interval.seconds for one in windows.values() if one), default=0.0)
    return "".join(
        _chart(run, traces[name], window, name, longest_s)
        for name, window in windows.items()
        if window is not None
    )


def _chart(run: Run, trace: Trace, window: Window, name: str, longest_s: float) -> str:
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
        sends = any(row.action.kind in (SEND_FORWARD, SEND_BACKWARD) for row in rows)
        height = LANE + (THIN + 3 if sends else 0)
        marks.append(text(LEFT - 8, top + LANE / 2 + 4, host, "label", "end"))
        marks.append(element("rect", x=LEFT, y=top, width=WIDTH - LEFT - 12, height=height,
                             class_="lane"))  # fmt: skip
        parts.extend(_bar(row, window, top, scale) for row in rows)
        top += height + GAP
    bottom = top
    for value in ticks(0, longest_s * 1e3, 8):
        x = LEFT + value / 1e3 * scale
        marks.append(element("line", x1=x, x2=x, y1=16, y2=bottom - 4, class_="grid"))
        marks.append(text(x, bottom + 10, digits(value), "tick", "middle"))
    marks.append(text(LEFT + (WIDTH - LEFT) / 2, bottom + 26, "milliseconds", "label", "middle"))
    hidden = sum(host.startswith("d") for host in hosts) - len(devices)
    title = f"{run.title}, {name}: step {window.step} of device {window.device}, {run.plan_text}"
    if hidden:
        title += f" ({hidden} more devices not drawn)"
    marks.append(text(8, 14, title, "chart-title"))
    return drawing(WIDTH, bottom + 32, "".join(marks + parts), f"Gantt chart of {title}")


def _inside(rows: Sequence[Timed], interval: Interval) -> list[Timed]:
    """Returns what is drawn of a host: computations and sends that overlap an interval."""
    return [
        row
        for row in rows
        if row.action.kind in _NAMES
        and row.end_s > interval.start_s
        and row.start_s < interval.end_s
    ]


def _bar(row: Timed, window: Window, top: float, scale: float) -> str:
    """Returns one action's bar, with its figures as a tooltip."""
    action = row.action
    start = max(row.start_s, window.interval.start_s) - window.interval.start_s
    end = min(row.end_s, window.interval.end_s) - window.interval.start_s
    sent = action.kind in (SEND_FORWARD, SEND_BACKWARD)
    micro = action.kind in (FORWARD, BACKWARD, LOSS) or sent
    classes = [f"hue{action.micro_batch % HUES}" if micro else "other"]
    classes.append("back" if action.kind in (BACKWARD, SEND_BACKWARD) else "fore")
    if action.step != window.step:
        classes.append("beside")
    width = max((end - start) * scale, 0.6)
    x, y = LEFT + start * scale, top + (LANE + 3 if sent else 0)
    height = THIN if sent else LANE
    size = f", {row.nbytes / 1e3:,.1f} kB" if sent else ""
    note = (
        f"{action}: {_NAMES[action.kind]}, {digits((row.end_s - row.start_s) * 1e3)} ms"
        f"{f', {row.samples} samples' if row.samples else ''}{size}"
    )
    shape = element(
        "rect", element("title", html.escape(note)), x=x, y=y, width=width, height=height, rx=2,
        class_=" ".join(["bar", *classes]),
    )  # fmt: skip
    word = f"{action.kind}{action.micro_batch}" if micro else action.kind
    if not sent and width > 9.0 * len(word):
        dark = "back" in classes and "beside" not in classes
        tone = "inside deep" if dark else "inside"
        shape += text(x + width / 2, y + LANE / 2 + 4, word, tone, "middle")
    key = f"{action.device}.{action.step}.{action.micro_batch}" if micro else ""
    return element("g", shape, data_key=key) if key else shape
