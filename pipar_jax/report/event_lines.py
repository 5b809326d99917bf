"""One plain line about an event that says all by itself."""

from __future__ import annotations

from collections.abc import Callable

from pipar_jax.disk.event_log import Event
from pipar_jax.schedule.plan import long_name


def _refused(event: Event) -> str:
    who = event["address"] if event["host"] is None else long_name(event["host"])
    more = f" ({event['untold']} more were refused)" if event["untold"] else ""
    return f"{who} was refused: {event['reason']}{more}"


#: By the event's name.
LINES: dict[str, Callable[[Event], str]] = {
    "round_cut": lambda event: (
        f"round {event['round'] + 1} ends before step {event['step'] + 1}, its rest follows: "
        f"{event['reason']}"
    ),
    "device_dropped": lambda event: (
        f"device {event['device']} is left out of round {event['round'] + 1}: {event['reason']}"
    ),
    "device_again": lambda event: (
        f"device {event['device']} takes part again, from round {event['round'] + 1} on"
    ),
    "round_undone": lambda event: (
        f"round {event['round'] + 1} is undone and repeated: {event['reason']}"
    ),
    "run_resumed": lambda event: f"goes on from the checkpoint after round {event['rounds']}",
    "checkpoint_skipped": lambda event: (
        f"the checkpoint after round {event['rounds']} is skipped: {event['reason']}"
    ),
    "checkpoint_failed": lambda event: (
        f"the run continues without a checkpoint after round {event['rounds']}: {event['reason']}"
    ),
    "state_lost": lambda event: (
        f"{long_name(event['host'])} begins with a fresh optimiser state: {event['reason']}"
    ),
    "state_not_kept": lambda event: (
        f"{long_name(event['host'])} could not keep its optimiser state after round "
        f"{event['rounds']}: {event['reason']}"
    ),
    "stopped": lambda event: f"stops after round {event['round'] + 1}: {event['reason']}",
    "replanned": lambda event: f"plan {event['plan']} from round {event['round'] + 1} on",
    "refused": _refused,
    "not_kept": lambda event: (
        f"the run continues, but some of its output is not saved: {event['reason']}"
    ),
    "metrics_undefined": lambda event: (
        f"{' and '.join(event['names'])} had no value in any evaluation (NaN): the test set may "
        "have no sample, position or class from which to compute it"
    ),
    "failed": lambda event: f"failed: {event['error']}",
}
