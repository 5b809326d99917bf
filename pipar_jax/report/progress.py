"""Progress of a run on the terminal, from its events.

A ``ProgressDisplay`` is called with each event (see ``pipar_jax.launch.launcher``). On a terminal
it updates a few lines in place; elsewhere it prints a plain line for each important event, and
repeats the state of the run after a while without one.
"""

from __future__ import annotations

import threading
import time

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from pipar_jax.disk.event_log import Event
from pipar_jax.report.event_lines import shorten
from pipar_jax.report.run_state import (
    RunState,
    busy_text,
    describe,
    learning_facts,
    position,
    traffic_facts,
)
from pipar_jax.schedule.plan import device_name

REFRESHES_PER_SECOND = 4
# Without a terminal: shortest interval between reports of steps, and longest interval without
# output.
PLAIN_PROGRESS_S = 10.0
BAR_WIDTH = 24


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
        self._console = console or Console(stderr=True, highlight=False, markup=False, emoji=False)
        self._began_s = self._printed_s = time.monotonic()
        self._live: Live | None = None
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._ticker: threading.Thread | None = None

    def __call__(self, event: Event) -> None:
        """Updates and shows the state by one event."""
        with self._lock:
            now_s = time.monotonic()
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
                    self._print_line(position(self.state), now_s)
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
        now += f" · without {shorten([device_name(device) for device in sorted(state.gone)], 4)}"
    left_s = state.left_s(now_s)
    if left_s is not None:
        now += f" · about {_clock(left_s)} left"
    bar.add_row(name, ProgressBar(total=1.0, completed=state.fraction, width=BAR_WIDTH), Text(now))
    lines: list[RenderableType] = [bar]
    if facts := [*learning_facts(state), *traffic_facts(state)]:
        lines.append(Text("  " + " · ".join(facts), no_wrap=True, overflow="ellipsis"))
    if state.idle:
        text = "  busy: " + busy_text(state.idle)
        lines.append(Text(text, style="dim", no_wrap=True, overflow="ellipsis"))
    return Group(*lines)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}" if minutes else f"{rest} s"
