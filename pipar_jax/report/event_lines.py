"""Plain lines about events that say all by themselves."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pipar_jax.disk.event_log import Event
from pipar_jax.schedule.plan import long_name


def _refused(event: Event) -> str:
    who = event["address"] if event["host"] is None else long_name(event["host"])
    more = f" ({event['untold']} more were refused)" if event["untold"] else ""
    return f"{who} was refused: {event['reason']}{more}"


def losses_text(event: Event) -> str:
    """Returns who was lost or left out of which rounds of a run, and who came back.

    Empty if nothing of this happened.
    """
    out: dict[int, list[int]] = {}
    for loss in event.get("losses", ()):
        out.setdefault(loss["device"], []).append(loss["round"] + 1)
    names = [
        f"device {device} of round{'s' if len(rounds) > 1 else ''} {shorten(rounds)}"
        for device, rounds in sorted(out.items())
    ]
    back = [f"device {device}" for device in sorted(set(event.get("returns", ())))]
    undone = event.get("undone", 0)
    lost = [long_name(name) for name in dict.fromkeys(event.get("lost_hosts", ()))]
    parts = [
        f"lost: {shorten(lost)}" if lost else "",
        f"left out: {shorten(names)}" if names else "",
        f"came back: {shorten(back)}" if back else "",
        f"{undone} {'rounds were' if undone > 1 else 'round was'} repeated" if undone else "",
    ]
    return "; ".join(filter(None, parts))


def shorten(names: Sequence[object], most: int = 10) -> str:
    """Returns the first few names, and the number of the others."""
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(str, names[:most])) + rest


def loss_text(event: Event) -> str:
    """Returns the loss of an event as text; None in the event means not finite."""
    return "not finite" if event["loss"] is None else f"{event['loss']:.4f}"


def gone_text(event: Event) -> str:
    """Returns that a host is gone and why; a reason may name it already."""
    name = f"device {event['device']}" if "device" in event else f"compute node {event['node']}"
    reason = str(event["reason"])
    return reason if reason.startswith(f"{name} ") else f"{name} is out: {reason}"


def work_text(event: Event) -> str:
    """Returns the current work of a host and its progress."""
    done = f": {event['done']} of {event['of']}" if event["of"] else ""
    return f"{event['host']} is {event['what']}{done}"


def _replaced(event: Event) -> str:
    """Returns what of lost compute nodes is lost with them."""
    names = ", ".join(map(long_name, event["nodes"]))
    last = event["round"]
    lost = [
        f"{unit['unit']} (round {last})"
        if unit["rounds"] + 1 == last
        else f"{unit['unit']} (rounds {unit['rounds'] + 1} to {last})"
        for unit in event["units"]
        if unit["rounds"] < last
    ]
    fresh = [unit["unit"] for unit in event["units"] if unit["optimizer_rounds"] is None]
    text = f"round {last + 1} goes on without {names}: "
    text += f"lost is the training of {shorten(lost) or 'no unit'}"
    return text + (f"; fresh optimiser states of {shorten(fresh)}" if fresh else "")


def _state_lost(event: Event) -> str:
    """Returns which of its own states a host lacks, and why."""
    lost = {"optimizer": "a fresh optimiser state", "personal": "older personal weights"}
    words = " and ".join(text for field, text in lost.items() if event[field])
    return f"{long_name(event['host'])} goes on with {words}: {event['reason']}"


def _nonfinite(event: Event) -> str:
    whose = "all devices" if event["device"] is None else f"device {event['device']}"
    where = f"{whose}, round {event['round']}, step {event['step']}"
    return f"not finite: {event['what']} of {where}"


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
    "warning": lambda event: f"{event['text']} (known on the device alone)",
    "cold_start": lambda event: event["reason"],
    "personal": lambda event: (
        f"{len(event['names'])} weights stay each device's own, and are not in the run's weights: "
        f"{', '.join(event['names'][:4])}{', …' if len(event['names']) > 4 else ''}"
    ),
    "run_resumed": lambda event: (
        f"goes on from the checkpoint after round {event['rounds']}"
        + (f", and reads no {' or '.join(event['unread'])}" if event.get("unread") else "")
    ),
    "checkpoint_skipped": lambda event: (
        f"the checkpoint after round {event['rounds']} is skipped: {event['reason']}"
    ),
    "checkpoint_failed": lambda event: (
        f"the run continues without a checkpoint after round {event['rounds']}: {event['reason']}"
    ),
    "resumed_without": lambda event: (
        f"{shorten(list(map(long_name, event['missing'])))} did not come back in time: the run "
        "goes on without"
    ),
    "checkpoints_removed": lambda event: (
        f"the checkpoints after rounds {shorten(event['rounds'])} are removed: the run goes on "
        f"from that after round {event['back_to']}"
    ),
    "state_lost": _state_lost,
    "state_not_kept": lambda event: (
        f"{long_name(event['host'])} could not keep its optimiser state after round "
        f"{event['rounds']}: {event['reason']}"
    ),
    "interrupted": lambda event: (
        f"ends as it was asked to, with a checkpoint after round {event['rounds']}"
    ),
    "stopped": lambda event: f"stops after round {event['round'] + 1}: {event['reason']}",
    "replanned": lambda event: f"plan {event['plan']} from round {event['round'] + 1} on",
    "refused": _refused,
    "device_lost": gone_text,
    "device_left": gone_text,
    "node_lost": gone_text,
    "node_left": gone_text,
    "nodes_replaced": _replaced,
    "nonfinite": _nonfinite,
    "not_kept": lambda event: (
        f"the run continues, but some of its output is not saved: {event['reason']}"
    ),
    "metrics_undefined": lambda event: (
        f"{' and '.join(event['names'])} had no value in any evaluation (NaN): the test set may "
        "have no sample, position or class from which to compute it"
    ),
    "failed": lambda event: f"failed: {event['error']}",
}
