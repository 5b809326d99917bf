"""The state of a run according to its events, and in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipar_jax.disk.event_log import Event, score_of
from pipar_jax.report.event_lines import LINES, gone_text, losses_text, work_text
from pipar_jax.report.scores import UNKNOWN, final_score, score_text, scores_text

#: Metrics of the training samples that are shown.
SHOWN_METRICS = 2
#: Events of which the phase says all.
_PHASES = (
    "waiting", "device_joined", "device_returned", "node_joined", "node_returned", "tuned",
)  # fmt: skip


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
        self.clip: float | None = None  # of users' updates, if it adapts
        self.delta = 0.0
        self.idle: dict[str, float] = {}
        self.round_s: list[float] = []
        self.began_s: float | None = None
        self._before = 0.0  # the fraction that was completed before the run was resumed
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
            self.phase = gone_text(event)
        elif kind == "node_joined":
            self.phase = f"compute node {event['node']} joined"
        elif kind == "node_returned":
            self.phase = f"compute node {event['node']} is back after {event['away_s']:.1f} s"
        elif kind in ("node_lost", "node_left"):
            self.phase = gone_text(event)
        elif kind == "tuned":
            self.phase = f"tuned to {event['plan']}: {event['epoch_s']:.2f} s per epoch predicted"
            if words := event.get("codecs"):
                self.phase += f"; {words}"
        elif kind == "working":
            self.phase = work_text(event)
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
        done = self.fraction - self._before  # since this process began: a resumed run had begun
        if self.began_s is None or done <= 0.02 * (1.0 - self._before):
            return None
        return (now_s - self.began_s) * (1.0 - self.fraction) / done

    def _start(self, event: Event, now_s: float) -> None:
        self.phase = "training"
        self.method, self.plan = event["method"], event["plan"]
        self.task = event["task"]
        self.devices = event["devices"]
        self.steps = list(event["steps"])
        self.rounds, self.epochs = event["rounds"], event["epochs"]
        self.rounds_done = event.get("resumed", 0)
        share = self.rounds_done / self.rounds if self.rounds else 0.0
        self.steps_done = [round(steps * share) for steps in self.steps]
        self._before = self.fraction
        self.began_s = now_s

    def _finish_round(self, event: Event) -> None:
        self.phase = "training"
        self.rounds_done = event["round"] + 1
        self.rounds = event["rounds"]
        seconds = event["seconds"]
        self.round_s.append(seconds)
        self._learn(event)
        if seconds > 0:
            # Private devices do not tell of their samples.
            self.samples_per_s = event["samples"] / seconds if event["samples"] else None
            self.up_mbps = event["bytes_up"] * 8e-6 / seconds
            self.down_mbps = event["bytes_down"] * 8e-6 / seconds
        if event.get("epsilon"):
            self.epsilon, self.delta = max(event["epsilon"].values()), event["delta"]
            self.clip = event.get("clip")
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


def describe(event: Event, state: RunState) -> str | None:
    """Returns one plain line about an event that is part of ``state``, or None."""
    kind = event["event"]
    if kind in _PHASES:
        return state.phase
    if kind in LINES:
        return LINES[kind](event)
    if kind == "run_started":
        return f"{state.devices} devices, {state.epochs:g} epochs, plan {state.plan}"
    if kind == "progress":
        return position(state)
    if kind == "private":
        noise = sorted(set(event["noise"].values()))
        text = " to ".join(f"{one:.4g}" for one in dict.fromkeys((noise[0], noise[-1])))
        before = max(event["epsilon"].values(), default=0.0)
        past = f", epsilon {before:.4g} released before" if before else ""
        return f"privacy, noise multiplier {text}{past}: " + "; ".join(event["words"])
    if kind == "round_finished":
        facts = [f"round {state.rounds_done} of {state.rounds} took {event['seconds']:.2f} s"]
        facts += [*learning_facts(state), *traffic_facts(state)]
        return ", ".join(facts) + f"; busy: {busy_text(state.idle)}"
    if kind == "evaluated":
        scores = ", ".join(scores_text(state.task, event, main=True))
        return f"test {scores} after epoch {event['epoch']:g}"
    if kind == "run_finished":
        lost = losses_text(event)
        end = f"finished in {event['seconds']:.1f} s, {final_score(event, 1)}"
        return f"{end}; {lost}" if lost else end
    if kind in ("saving", "working"):
        return state.phase
    return None


def position(state: RunState) -> str:
    """Returns the state of a run in one line."""
    if state.phase != "training":
        return state.phase
    done = f"step {sum(state.steps_done)} of {sum(state.steps)} of all devices"
    return ", ".join([done, *learning_facts(state)])


def learning_facts(state: RunState) -> list[str]:
    """Returns what has been learned: loss, metrics, test score, privacy loss."""
    facts = []
    if state.loss is not None:
        facts.append(f"loss {state.loss:.3f}")
    facts += state.metrics[:SHOWN_METRICS]
    if state.test_score is not None:
        facts.append(f"test {state.test_score}")
    if state.epsilon is not None:
        facts.append(f"epsilon {state.epsilon:.3g} at delta {state.delta:g}")
    if state.clip is not None:
        facts.append(f"next clip {state.clip:.3g}")
    return facts


def traffic_facts(state: RunState) -> list[str]:
    """Returns the rates of the last round: samples, and bits on all links."""
    facts = []
    if state.samples_per_s is not None:
        facts.append(f"{state.samples_per_s:,.0f} samples/s")
    if state.up_mbps is not None and state.down_mbps is not None:
        facts.append(f"links {state.up_mbps:.1f} Mbit/s up, {state.down_mbps:.1f} down")
    return facts


def busy_text(idle: Mapping[str, float]) -> str:
    """Returns the busy shares of hosts as text.

    Args:
      idle: Idle shares by host, in [0, 1].
    """
    return ", ".join(f"{host} {1 - share:.0%}" for host, share in idle.items())
