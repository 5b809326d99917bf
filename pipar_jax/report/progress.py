"""Progress of a run on the terminal, from its events.

A ``Progress`` is called with each event (see ``pipar_jax.launch.launcher``). On a terminal it
updates a few lines in place; elsewhere it prints a plain line for each important event, and repeats
the state of the run after a while without one.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from pipar_jax.disk.event_log import Event, score_of
from pipar_jax.report.event_lines import LINES
from pipar_jax.report.scores import UNKNOWN, final_score, score_text, scores_text
from pipar_jax.schedule.plan import device_name, long_name

REFRESHES_PER_SECOND = 4
# Without a terminal: shortest interval between reports of steps, and longest interval without
# output.
PLAIN_PROGRESS_S = 10.0
BAR_WIDTH = 24
#: Metrics of the training samples that are shown.
SHOWN_METRICS = 2


class RunState:
    """The state of a run according to its events so far."""

    def __init__(self) -> None:
        self.phase = "starting"
        self.method = ""
        self.plan = ""
        self.devices = 0
        self.gone: set[int] = set()  # devices that are lost or have left, and are not back
        self.epochs = 0
        self.rounds = 0
        self.rounds_done = 0
        self.steps: list[int] = []
        self.steps_done: list[int] = []
        self.loss: float | None = None
        self.task: Mapping[str, Any] = UNKNOWN
        self.metrics: list[str] = []  # as texts
        self.test_score: str | None = None
        self.samples_per_s: float | None = None
        self.up_mbps: float | None = None
        self.down_mbps: float | None = None
        self.epsilon: float | None = None  # the largest of any device
        self.delta = 0.0
        self.idle: dict[str, float] = {}
        self.round_s: list[float] = []
        self.began_s: float | None = None
        self.ended = False

    def follow(self, event: Event, now_s: float) -> None:
        """Updates the state by an event received at ``now_s`` on the local monotonic clock."""
        kind = event["event"]
        if kind == "waiting":
            self.phase = "waiting for " + ", ".join(map(str, event["missing"]))
        elif kind == "device_joined":
            self.gone.discard(event["device"])
            self.phase = f"device {event['device']} joined with {event['samples']:,} samples"
        elif kind == "device_returned":
            self.gone.discard(event["device"])
            self.phase = f"device {event['device']} is back after {event['away_s']:.1f} s"
        elif kind in ("device_lost", "device_left"):
            self.gone.add(event["device"])
            self.phase = _gone(event)
        elif kind == "node_joined":
            self.phase = f"compute node {event['node']} joined"
        elif kind == "node_returned":
            self.phase = f"compute node {event['node']} is back after {event['away_s']:.1f} s"
        elif kind in ("node_lost", "node_left"):
            self.phase = _gone(event)
        elif kind == "tuned":
            self.phase = f"tuned to {event['plan']}: {event['epoch_s']:.2f} s per epoch predicted"
        elif kind == "working":
            self.phase = _work(event)
        elif kind == "saving":
            self.phase = f"saving {event['file']}"
        elif kind == "prepared":
            self.phase = "compiled and calibrated"
        elif kind == "run_started":
            self._start(event, now_s)
        elif kind == "progress":
            self.phase = "training"  # replaces an earlier phase, such as profiling
            self.steps_done[event["device"]] = event["step"] + 1
            self._learn(event)
        elif kind == "round_finished":
            self._finish_round(event)
        elif kind == "evaluated":
            self._learn_test(event)
        elif kind == "run_finished":
            self.phase, self.ended = "finished", True
            if "metrics" in event:
                self._learn_test(event)
            self.idle = dict(event.get("idle") or self.idle)
        elif kind == "failed":
            self.phase, self.ended = "failed", True

    @property
    def fraction(self) -> float:
        """The completed share of the run, by steps and rounds, in [0, 1]."""
        if self.ended and self.phase == "finished":
            return 1.0
        if not self.rounds:
            return 0.0
        by_steps = sum(self.steps_done) / max(sum(self.steps), 1)
        return min(max(by_steps, self.rounds_done / self.rounds), 1.0)

    def left_s(self, now_s: float) -> float | None:
        """Returns the expected seconds to the end, or None if they cannot be estimated yet."""
        if self.ended:
            return 0.0
        if self.began_s is None or self.fraction < 0.02:
            return None
        return (now_s - self.began_s) * (1.0 / self.fraction - 1.0)

    def _start(self, event: Event, now_s: float) -> None:
        self.phase = "training"
        self.method, self.plan = event["method"], event["plan"]
        self.task = event["task"]
        self.devices = event["devices"]
        self.steps = list(event["steps"])
        self.steps_done = [0] * len(self.steps)
        self.rounds, self.epochs = event["rounds"], event["epochs"]
        self.began_s = now_s

    def _finish_round(self, event: Event) -> None:
        self.phase = "training"
        self.rounds_done = event["round"] + 1
        self.rounds = event["rounds"]
        seconds = event["seconds"]
        self.round_s.append(seconds)
        self._learn(event)
        if seconds > 0:
            self.samples_per_s = event["samples"] / seconds
            self.up_mbps = event["bytes_up"] * 8e-6 / seconds
            self.down_mbps = event["bytes_down"] * 8e-6 / seconds
        if event.get("epsilon"):
            self.epsilon, self.delta = max(event["epsilon"].values()), event["delta"]
        self.idle = dict(event["idle"])

    def _learn(self, event: Event) -> None:
        if "loss" in event:  # None: not finite
            self.loss = event["loss"]
        if "metrics" in event:
            self.metrics = scores_text(self.task, event)

    def _learn_test(self, event: Event) -> None:
        self.task = event.get("task", self.task)
        name = self.task["main"]
        self.test_score = score_text(self.task, name, score_of(event, name))


class ProgressDisplay:
    """Shows the progress of a run; pass it to ``launch`` as ``on_event``.

    Args:
      title: What stands at the head of a line; the method's name unless given.
      console: Where to show it; standard error unless given.

    Example:
        with ProgressDisplay() as progress:
            summary = launch(config, on_event=progress)
    """

    def __init__(self, title: str = "", *, console: Console | None = None) -> None:
        self.state = RunState()
        self._title = title
        self._console = console or Console(stderr=True, highlight=False)
        self._began_s = self._printed_s = time.monotonic()
        self._live: Live | None = None
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._ticker: threading.Thread | None = None

    def __call__(self, event: Event) -> None:
        """Updates and shows the state by one event."""
        now_s = time.monotonic()
        with self._lock:
            self.state.follow(event, now_s)
            if not self._console.is_terminal:
                self._print(event, now_s)
                return
        if self._live is None and not self._closed.is_set():
            self._live = Live(
                get_renderable=lambda: render(self.state, time.monotonic(), self._title),
                console=self._console,
                refresh_per_second=REFRESHES_PER_SECOND,
                transient=True,
            )
            self._live.start()

    def close(self) -> None:
        """Restores the terminal; has to be called however the run ended. Idempotent."""
        self._closed.set()
        if self._ticker is not None:
            self._ticker.join()
        if self._live is not None:
            live, self._live = self._live, None
            live.stop()

    def __enter__(self) -> ProgressDisplay:
        if not self._console.is_terminal:
            self._ticker = threading.Thread(target=self._tick, name="pipar-progress", daemon=True)
            self._ticker.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _tick(self) -> None:
        """Repeats the state of the run after ``PLAIN_PROGRESS_S`` without output."""
        wait_s = PLAIN_PROGRESS_S
        while not self._closed.wait(wait_s):
            with self._lock:
                now_s = time.monotonic()
                wait_s = self._printed_s + PLAIN_PROGRESS_S - now_s
                if wait_s > 0.0:
                    continue
                wait_s = PLAIN_PROGRESS_S
                if self.state.ended:
                    return
                try:
                    self._print_line(_at(self.state), now_s)
                except OSError:  # reported when the next event is printed
                    return

    def _print(self, event: Event, now_s: float) -> None:
        often = event["event"] in ("progress", "working")
        if often and now_s - self._printed_s < PLAIN_PROGRESS_S:
            return
        line = describe(event, self.state)
        if line is not None:
            self._print_line(line, now_s)

    def _print_line(self, line: str, now_s: float) -> None:
        self._printed_s = now_s
        name = self._title or self.state.method
        self._console.print(
            f"{now_s - self._began_s:7.1f} s  {name + ': ' if name else ''}{line}",
            markup=False,
            soft_wrap=True,
        )


def render(state: RunState, now_s: float, title: str = "") -> RenderableType:
    """Returns the lines that a terminal shows for a state."""
    name = Text(title or state.method, style="bold")
    if state.phase != "training":
        return Text.assemble(name, "  " if name else "", (state.phase, "dim"), no_wrap=True)
    bar = Table.grid(padding=(0, 1))
    now = f"round {min(state.rounds_done + 1, state.rounds)}/{state.rounds}"
    now += f" · step {sum(state.steps_done)}/{sum(state.steps)}"
    if state.gone:
        now += f" · without {_some([device_name(one) for one in sorted(state.gone)], 4)}"
    left_s = state.left_s(now_s)
    if left_s is not None:
        now += f" · about {_clock(left_s)} left"
    bar.add_row(name, ProgressBar(total=1.0, completed=state.fraction, width=BAR_WIDTH), Text(now))
    lines: list[RenderableType] = [bar]
    if facts := [*_learning(state), *_traffic(state)]:
        lines.append(Text("  " + " · ".join(facts), no_wrap=True, overflow="ellipsis"))
    if state.idle:
        text = "  busy: " + _busy(state.idle)
        lines.append(Text(text, style="dim", no_wrap=True, overflow="ellipsis"))
    return Group(*lines)


#: Events of which the phase says all.
_PHASES = (
    "waiting", "device_joined", "device_returned", "node_joined", "node_returned", "tuned",
)  # fmt: skip


def describe(event: Event, state: RunState) -> str | None:
    """Returns one plain line about an event that is part of ``state``, or None."""
    kind = event["event"]
    if kind in _PHASES:
        return state.phase
    if kind in ("device_lost", "device_left", "node_lost", "node_left"):
        return _gone(event)
    if kind == "nodes_replaced":
        return _replaced(event)
    if kind in LINES:
        return LINES[kind](event)
    if kind == "run_started":
        return f"{state.devices} devices, {state.epochs} epochs, plan {state.plan}"
    if kind == "progress":
        return _at(state)
    if kind == "private":
        noise = sorted(set(event["noise"].values()))
        text = " to ".join(f"{one:.4g}" for one in dict.fromkeys((noise[0], noise[-1])))
        return f"privacy, noise multiplier {text}: " + "; ".join(event["words"])
    if kind == "round_finished":
        facts = [f"round {state.rounds_done} of {state.rounds} took {event['seconds']:.2f} s"]
        facts += [*_learning(state), *_traffic(state)]
        return ", ".join(facts) + f"; busy: {_busy(state.idle)}"
    if kind == "evaluated":
        scores = ", ".join(scores_text(state.task, event, main=True))
        return f"test {scores} after epoch {event['epoch']:g}"
    if kind == "run_finished":
        lost = losses_text(event)
        end = f"finished in {event['seconds']:.1f} s, {final_score(event, 1)}"
        return f"{end}; {lost}" if lost else end
    if kind in ("saving", "working"):
        return state.phase
    if kind == "nonfinite":
        whose = "all devices" if event["device"] is None else f"device {event['device']}"
        where = f"{whose}, round {event['round']}, step {event['step']}"
        return f"not finite: {event['what']} of {where}"
    return None


def losses_text(event: Event) -> str:
    """Returns who was lost or left out of which rounds of a run, and who came back.

    Empty if nothing of this happened.
    """
    out: dict[int, list[int]] = {}
    for loss in event.get("losses", ()):
        out.setdefault(loss["device"], []).append(loss["round"] + 1)
    names = [
        f"device {device} of round{'s' if len(rounds) > 1 else ''} {_some(rounds)}"
        for device, rounds in sorted(out.items())
    ]
    back = [f"device {device}" for device in sorted(set(event.get("returns", ())))]
    undone = event.get("undone", 0)
    lost = [long_name(name) for name in dict.fromkeys(event.get("lost_hosts", ()))]
    parts = [
        f"lost: {_some(lost)}" if lost else "",
        f"left out: {_some(names)}" if names else "",
        f"came back: {_some(back)}" if back else "",
        f"{undone} {'rounds were' if undone > 1 else 'round was'} repeated" if undone else "",
    ]
    return "; ".join(filter(None, parts))


def _some(names: Sequence[object], most: int = 10) -> str:
    """Returns the first few names, and the number of the others."""
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(str, names[:most])) + rest


def loss_text(event: Event) -> str:
    """Returns the loss of an event as text; None in the event means not finite."""
    return "not finite" if event["loss"] is None else f"{event['loss']:.4f}"


def _gone(event: Event) -> str:
    """Returns that a host is gone and why; a reason may name it already."""
    name = f"device {event['device']}" if "device" in event else f"compute node {event['node']}"
    reason = str(event["reason"])
    return reason if reason.startswith(f"{name} ") else f"{name} is out: {reason}"


def _replaced(event: Event) -> str:
    """Returns what of lost compute nodes is lost with them."""
    names = ", ".join(map(long_name, event["nodes"]))
    last = event["round"]
    lost = [
        f"{one['unit']} (round {last})"
        if one["rounds"] + 1 == last
        else f"{one['unit']} (rounds {one['rounds'] + 1} to {last})"
        for one in event["units"]
        if one["rounds"] < last
    ]
    fresh = [one["unit"] for one in event["units"] if one["optimizer_rounds"] is None]
    text = f"round {last + 1} goes on without {names}: "
    text += f"lost is the training of {_some(lost) or 'no unit'}"
    return text + (f"; fresh optimiser states of {_some(fresh)}" if fresh else "")


def _work(event: Event) -> str:
    """Returns the current work of a host and its progress."""
    done = f": {event['done']} of {event['of']}" if event["of"] else ""
    return f"{event['host']} is {event['what']}{done}"


def _at(state: RunState) -> str:
    """Returns the state of a run in one line."""
    if state.phase != "training":
        return state.phase
    done = f"step {sum(state.steps_done)} of {sum(state.steps)} of all devices"
    return ", ".join([done, *_learning(state)])


def _learning(state: RunState) -> list[str]:
    facts = []
    if state.loss is not None:
        facts.append(f"loss {state.loss:.3f}")
    facts += state.metrics[:SHOWN_METRICS]
    if state.test_score is not None:
        facts.append(f"test {state.test_score}")
    if state.epsilon is not None:
        facts.append(f"epsilon {state.epsilon:.3g} at delta {state.delta:g}")
    return facts


def _traffic(state: RunState) -> list[str]:
    if state.samples_per_s is None or state.up_mbps is None or state.down_mbps is None:
        return []
    return [
        f"{state.samples_per_s:,.0f} samples/s",
        f"links {state.up_mbps:.1f} Mbit/s up, {state.down_mbps:.1f} down",
    ]


def _busy(idle: Mapping[str, float]) -> str:
    return ", ".join(f"{host} {1 - share:.0%}" for host, share in idle.items())


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}" if minutes else f"{rest} s"
