"""Who took part in the rounds of a run, who was out or came back, and what that cost."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterable, Iterator, Sequence

from pipar_jax.config.membership_script import Attempt
from pipar_jax.disk.json_text import JsonMapping
from pipar_jax.report.run import RecordedRun
from pipar_jax.schedule.plan import device_name, node_name

#: Most rounds that are shown, and most devices that are named in one cell.
MOST_ROUNDS, MOST_NAMES = 200, 8
#: Events that are counted for all of a run, and how they are called.
_COUNTED = (
    ("device_dropped", "devices left out of a round"),
    ("device_lost", "devices lost"),
    ("device_left", "devices that left"),
    ("node_lost", "compute nodes lost"),
    ("node_left", "compute nodes that left"),
    ("device_returned", "returns"),
    ("node_returned", "compute nodes that came back"),
)


@dataclasses.dataclass(frozen=True)
class Disturbed:
    """An attempt at a round in which, or before which, a host came or went.

    Attributes:
      round: Its number, from 0.
      taking: Number of devices that began it.
      counted: Number of those that count; 0 if it was undone.
      out: Who was lost, late or dropped, and from which step.
      back: Who came back, or joined after the start, before it ended.
      seconds: Its duration.
      extra_s: By how much it was longer than the median of the run's undisturbed rounds, which is
        the cost of waiting for a deadline and of recomputed steps; all of it if it was undone.
        None if there is no undisturbed round.
    """

    round: int
    taking: int
    counted: int
    out: tuple[str, ...]
    back: tuple[str, ...]
    seconds: float
    extra_s: float | None


def disturbed_rounds(run: RecordedRun) -> list[Disturbed]:
    """Returns the attempts at rounds in or before which a host came or went, in order."""
    attempts, away = list[Disturbed](), dict[int, int]()
    for done, before, script in _attempts(run):
        attempts.append(_read(done, before, script, away))
    calm = [
        round_.seconds for round_ in attempts if not (round_.out or round_.back) and round_.counted
    ]
    usual_s = statistics.median(calm) if calm else None
    return [
        dataclasses.replace(round_, extra_s=_extra(round_, usual_s))
        for round_ in attempts
        if round_.out or round_.back or not round_.counted
    ]


def membership_rows(run: RecordedRun) -> list[list[str | float | None]]:
    """Returns the cells of a table, a row for each disturbed round; none if nothing happened."""
    disturbed = disturbed_rounds(run)
    rows: list[list[str | float | None]] = [
        [
            f"{round_.round + 1}" if round_.counted else f"{round_.round + 1}, undone",
            f"{round_.counted} of {round_.taking}",
            _some(round_.out),
            _some(round_.back),
            round_.seconds,
            round_.extra_s,
        ]
        for round_ in disturbed[:MOST_ROUNDS]
    ]
    if (left := len(disturbed) - MOST_ROUNDS) > 0:
        rows.append([f"{left} more in metrics.jsonl", *[""] * 5])
    return rows


def membership_text(run: RecordedRun) -> str:
    """Returns one sentence about all of a run's losses, returns and repeated rounds."""
    disturbed = disturbed_rounds(run)
    counts = [(len(run.of(event)), text) for event, text in _COUNTED]
    counts.append((sum(not round_.counted for round_ in disturbed), "rounds undone and repeated"))
    parts = [f"{text}: {count}" for count, text in counts if count]
    extra_s = sum(round_.extra_s or 0.0 for round_ in disturbed)
    if extra_s >= 0.05:
        parts.append(f"more seconds than in as many undisturbed rounds: {extra_s:.1f}")
    return "; ".join(parts) + "."


def _attempts(
    run: RecordedRun,
) -> Iterator[tuple[JsonMapping, list[JsonMapping], Attempt | None]]:
    """Yields each attempt's last event, those from the attempt before it on, and its script."""
    begun, index = False, 0
    before: list[JsonMapping] = []
    for row in run.events:
        if row["event"] == "run_started":
            begun, before = True, []
        elif begun and row["event"] == "round_finished":
            script = run.attempts[index] if index < len(run.attempts) else None
            yield row, before, script if script and script.round == row["round"] else None
            before, index = [], index + 1
        elif begun:
            before.append(row)


def _read(
    done: JsonMapping,
    before: Sequence[JsonMapping],
    script: Attempt | None,
    away: dict[int, int],
) -> Disturbed:
    """Returns what an attempt's events and script say.

    Args:
      done: The event at its end.
      before: The events since the attempt before it.
      script: Its part of the run's membership script.
      away: For each device that was left out but not lost, in which round; brought up to date.
    """
    out: dict[int, str] = {}
    for row in before:
        if row["event"] in ("device_lost", "device_left"):
            out[row["device"]] = row["event"].removeprefix("device_")
    for row in before:
        if row["event"] == "device_dropped":
            out[row["device"]] = _dropped(row, script)
    back = [
        f"{device_name(row['device'])} after {row['away_s']:.1f} s"
        if row["event"] == "device_returned"
        else f"{device_name(row['device'])} joined"
        for row in before
        if row["event"] in ("device_returned", "device_joined")
    ]
    nodes = [
        f"{node_name(row['node'])} {row['event'].removeprefix('node_')}"
        for row in before
        if row["event"] in ("node_lost", "node_left")
    ]
    back += [
        f"{node_name(row['node'])} after {row['away_s']:.1f} s"
        for row in before
        if row["event"] == "node_returned"
    ]
    index = int(done["round"])
    for device in () if script is None else sorted({script.cohort[p] for p, _, _ in script.spans}):
        since = away.pop(device, index)
        if index - since > 1:
            back.append(f"{device_name(device)} again, out since round {since + 1}")
    away |= {row["device"]: index for row in before if row["event"] == "device_dropped"}
    for row in before:
        if row["event"] in ("device_lost", "device_left"):
            away.pop(row["device"], None)
    return Disturbed(
        index, int(done["devices"]), int(done["committed"]),
        (*nodes, *(f"{device_name(device)} {how}" for device, how in sorted(out.items()))),
        tuple(back), float(done["seconds"]), None,
    )  # fmt: skip


def _dropped(row: JsonMapping, script: Attempt | None) -> str:
    """Returns why a device was dropped and what of its steps counts.

    Where gradients are summed, the step is known when all have gone back to it: the script has it.
    """
    why, steps = str(row["why"]).replace("nonfinite", "not finite"), int(row["steps"])
    counted = 0
    if script is not None:
        place = script.cohort.index(row["device"]) if row["device"] in script.cohort else None
        spans = [(first, stop) for taken, first, stop in script.spans if taken == place]
        ends = [out.step for out in script.out if out.place == place]
        if spans and ends:
            counted = sum(max(min(stop, ends[0]) - first, 0) for first, stop in spans)
    return f"{why} from step {counted + 1} of {steps}" if counted else f"{why}, no step counts"


def _extra(disturbed: Disturbed, usual_s: float | None) -> float | None:
    """Returns what an attempt took beyond an undisturbed round."""
    if not disturbed.counted:
        return disturbed.seconds
    return None if usual_s is None else disturbed.seconds - usual_s


def _some(names: Iterable[str]) -> str:
    """Returns the first few reasons, and the number of the others."""
    all_names = list(names)
    rest = len(all_names) - MOST_NAMES
    return "; ".join(all_names[:MOST_NAMES]) + (f"; and {rest} more" if rest > 0 else "")
