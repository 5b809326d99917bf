"""The course of a run: who trains in its rounds, what is kept of it, when it ends.

Annotations are real objects (no ``from __future__ import annotations``); see ``fields``.
"""

import dataclasses

from pipar_jax.config.schema import LONGEST_S, option

#: Ways to choose a round's cohort, in addition to a function of the user's (module:NAME:FUNCTION).
SELECTIONS = ("uniform", "by_samples")
#: Whose test data are evaluated.
EVALUATED = ("server", "devices", "both")
TRACED = ("all", "ends", "none")


@dataclasses.dataclass(slots=True)
class CohortConfig:
    """Which devices train in a round, when a round is over, and what becomes of lost devices."""

    size: float = option(
        0.0,
        "devices in a round: a number, or below 1 a share of all devices; 0: all that are there",
        at_least=0,
    )
    select: str = option(
        "uniform",
        f"how they are chosen: {', '.join(SELECTIONS)}, or module:NAME:FUNCTION",
    )
    min_devices: int = option(0, "devices with which a run may begin; 0: all", at_least=0)
    quorum: int = option(
        0, "devices that have to finish a round; the rest may be lost or late; 0: all", at_least=0
    )
    deadline_s: float = option(
        0.0,
        "seconds after which a round goes on without those that are late; 0: no deadline",
        at_least=0,
        at_most=LONGEST_S,
    )
    first: int = option(
        0, "end a round when so many devices have finished it; 0: wait for all", at_least=0
    )
    below: str = option(
        "end",
        "with fewer than the quorum: end the run; repeat the round when the quorum is there; or "
        "wait for those that are late, then repeat",
        choices=("end", "repeat", "wait"),
    )
    wait_s: float = option(
        10.0,
        "seconds to wait for more devices: at the start beyond min_devices, later for the quorum",
        at_least=0,
        at_most=LONGEST_S,
    )
    optimizer_state: str = option(
        "auto",
        "optimiser state of a device that is dropped from a round: keep that of the round's start, "
        "which takes a second copy, or reset it; auto: keep, and reset where size samples devices",
        choices=("auto", "keep", "reset"),
    )
    script: str = option(
        "", "membership.jsonl of a run whose losses are replayed; empty: none", path=""
    )


@dataclasses.dataclass(slots=True)
class CheckpointConfig:
    """What of a run is kept on disk, so that it can go on after a crash or an interruption."""

    every_rounds: int = option(0, "rounds between checkpoints; 0: none by rounds", at_least=0)
    every_s: float = option(
        0.0, "seconds between checkpoints; 0: none by time", at_least=0, at_most=LONGEST_S
    )
    keep: int = option(3, "newest checkpoints to keep", at_least=1)
    best: str = option(
        "",
        "keep the best checkpoint as well, by this score on the test set: loss or a metric of the "
        "task; empty: none",
    )
    device_state: str = option(
        "device",
        "where optimiser states of devices and nodes are kept: on their own disks, or pulled to "
        "the server",
        choices=("device", "server"),
    )


@dataclasses.dataclass(slots=True)
class StopConfig:
    """When a run ends before its last round."""

    metric: str = option(
        "", "score on the test set that counts: loss or a metric of the task; empty: the task's own"
    )
    patience: int = option(
        0, "evaluations without a better score after which the run ends; 0: never", at_least=0
    )
    target: float | None = option(None, "score at which the run ends; none: no target")
    when: str = option(
        "", "your own MODULE:FUNCTION, called with every event: the run ends once it returns true"
    )


@dataclasses.dataclass(slots=True)
class RunConfig:
    """Files and events of a run."""

    dir: str = option(
        "runs", "parent folder of all runs; each run has a folder of its own", path=""
    )
    resume: str = option(
        "",
        "go on from a checkpoint: auto (the newest of this run's folder, if it has one), or the "
        "folder of a run or of one of its checkpoints; empty: begin anew",
        path="",
        words=("auto",),
    )
    trace: str = option(
        "all",
        "record the time of every action: in all rounds, at both ends of the run (the first and "
        "the last three rounds), or not at all",
        choices=TRACED,
    )
    sinks: str = option(
        "",
        "further destinations of events: tensorboard, or your own MODULE:FUNCTION",
    )
    compile_cache: bool = option(True, "cache compiled programs in the user's cache folder")
    evaluate_every: int = option(
        1, "rounds between evaluations; 0: only after the last round", at_least=0
    )
    evaluate_on: str = option(
        "server",
        "whose test data are evaluated: the server's; the devices' own, on each device, which then "
        "receives the whole network after the rounds that are evaluated; or both",
        choices=EVALUATED,
    )
    rounds: int = option(
        0, "rounds to train, instead of `epochs`; 0: as many as the epochs have", at_least=0,
        at_most=10**6,
    )  # fmt: skip
    nonfinite: str = option(
        "end",
        "when a loss or weights are not finite: end the run, ignore it except for an event, or "
        "drop the device from the round",
        choices=("end", "ignore", "drop"),
    )
    progress_every_s: float = option(
        0.5, "seconds between progress events", at_least=0, at_most=LONGEST_S
    )
