"""What a resumed run takes over: the newest whole checkpoint, and the events up to it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pipar_jax.config import Config, from_dict, membership_script
from pipar_jax.config.checkpoints import CHECKPOINTS, check_continues, resumed
from pipar_jax.disk.event_log import read_events
from pipar_jax.errors import ConfigError, RunError
from pipar_jax.roles.admission import describe
from pipar_jax.roles.checkpoint_store import Kept, read_newest
from pipar_jax.roles.run_folder import METRICS
from pipar_jax.roles.timetable import Timetable
from pipar_jax.schedule.plan import Plan, device_name, is_node
from pipar_jax.training.base_weights import digest
from stages import Model

#: Events that a round ends with; what comes after the last of them is not of that round.
_OF_ROUNDS = ("round_finished", "evaluated", "checkpoint")


class Past(NamedTuple):
    """What there was of a run before this process.

    Attributes:
      kept: Its newest whole checkpoint; None if it begins anew.
      rows: Its events up to there.
      script: Its attempts at rounds up to there.
    """

    kept: Kept | None
    rows: tuple[dict[str, Any], ...]
    script: tuple[dict[str, Any], ...]

    @property
    def rounds(self) -> int:
        """How many rounds are over."""
        return 0 if self.kept is None else self.kept.rounds

    @property
    def hosts(self) -> tuple[str, ...]:
        """The compute nodes with stages and the devices that there were at the checkpoint."""
        if self.kept is None:
            return ()
        facts = self.kept.facts
        nodes = filter(is_node, Plan.from_dict(facts["plan"]).hosts())
        there = (row["index"] for row in facts["population"] if row["present"])
        return (*nodes, *map(device_name, there))


def read_past(
    config: Config, model: Model, fingerprint: str, tell: Callable[[dict[str, Any]], None]
) -> Past | None:
    """Returns what a run goes on from; None for a run that is a new one.

    Args:
      config: Resolved configuration.
      model: The whole model.
      fingerprint: What tells the test set from others.
      tell: Takes an event for each checkpoint that cannot be read.

    Raises:
      ConfigError: The checkpoint is one that this configuration, model, base weights or test set do
        not continue, or there is no round left to train.
      RunError: There is no whole checkpoint, and ``run.resume`` names one.
    """
    wanted = resumed(config.name, config.run)
    if wanted is None:
        return None
    unread: list[str] = []

    def skip(rounds: int, reason: str) -> None:
        unread.append(reason)
        tell({"event": "checkpoint_skipped", "rounds": rounds, "reason": reason})

    kept = read_newest(wanted.folder, wanted.newest, skip)
    if kept is None:
        if wanted.required or unread:
            raise RunError(
                f"run.resume={config.run.resume!r}: no checkpoint of {wanted.folder} can be read"
                f"{': ' if unread else ''}{'; '.join(unread)}"
            )
        return Past(None, (), ())
    where = str(wanted.folder / CHECKPOINTS / str(kept.rounds))
    check_continues(config, kept.facts, where)
    if kept.facts["model"] != describe(model):
        raise ConfigError(
            f"{where} is of another model: its units differ from those of {model.name!r}; give "
            "the same model, or begin a new run"
        )
    check_base(kept.facts, model, config.model.base, where)
    check_data(kept.facts["data"], "server", fingerprint, where)
    _check_rounds(config, kept, where)
    rows: Sequence[dict[str, Any]] = ()
    script: Sequence[dict[str, Any]] = ()
    with contextlib.suppress(OSError):  # the run goes on without the history that is gone
        rows = read_events(wanted.folder / METRICS)
    with contextlib.suppress(OSError):
        script = read_events(wanted.folder / membership_script.FILE, "round")
    attempts = tuple(one for one in script if one["round"] < kept.rounds)
    return Past(kept, rows_until(rows, kept.rounds), attempts)


def timetable(
    config: Config, plan: Plan, steps: Sequence[int], facts: Mapping[str, Any]
) -> Timetable:
    """Returns the rounds of a run that begins, or goes on from a checkpoint.

    Args:
      config: Resolved configuration.
      plan: The plan.
      steps: Steps in an epoch of each device that was present when the run began.
      facts: What the checkpoint says of the run; empty for a new run.
    """
    ends = facts.get("ends", ())
    if facts and "ends" not in facts:  # of a version that did not keep them
        before = from_dict(facts["config"])
        first = Timetable(before.epochs, before.run.rounds, plan, steps)
        ends = first.ends_after(facts["rounds"])
    return Timetable(config.epochs, config.run.rounds, plan, steps, ends)


def _check_rounds(config: Config, kept: Kept, where: str) -> None:
    """Refuses a run that has as many rounds as are over, or fewer: it would train nothing.

    Raises:
      ConfigError: It has.
    """
    plan, steps = Plan.from_dict(kept.facts["plan"]), kept.facts["steps"]
    rounds = timetable(config, plan, steps, kept.facts).rounds
    if rounds <= kept.rounds:
        given = config.run.rounds
        field, value = ("run.rounds", given) if given else ("epochs", config.epochs)
        raise ConfigError(
            f"{where} has {kept.rounds} rounds behind it, and with {field}={value} the run has "
            f"{rounds}: raise {field} to go on, resume an earlier checkpoint, or take its weights "
            "as they are (pipar export, or another run's model.weights)"
        )


def check_base(facts: Mapping[str, Any], model: Model, base: str, where: str | Path) -> None:
    """Refuses a run whose base weights are not those that it was trained on.

    They are in a file of each host, and in no checkpoint.

    Args:
      facts: What the checkpoint says of the run.
      model: The whole model.
      base: ``model.base``, for the message.
      where: The checkpoint, for the message.

    Raises:
      ConfigError: They are others.
    """
    known = facts.get("base")
    if known is None:  # of a version that did not keep them
        return
    for unit in model.units:
        if digest(model, unit) != known.get(unit.name, ""):
            raise ConfigError(
                f"model.base={base!r} does not continue {where}: its weights of unit "
                f"{unit.name!r} are not those that the run began with; give a copy of the file "
                "that it began with (none, if it began with none), or begin a new run"
            )


def check_data(known: Mapping[str, str], host: str, fingerprint: str, where: str | Path) -> None:
    """Refuses a host whose data are not those that the run was trained with.

    Raises:
      ConfigError: They are others.
    """
    if (before := known.get(host)) is not None and before != fingerprint:
        raise ConfigError(
            f"{where} was trained with other data: the samples of {host} (data.source) have the "
            f"fingerprint {fingerprint}, in the checkpoint {before}; give the same data, or begin "
            "a new run"
        )


def rows_until(rows: Sequence[dict[str, Any]], rounds: int) -> tuple[dict[str, Any], ...]:
    """Returns the events of the first rounds of a run, and what came before them.

    Args:
      rows: All its events.
      rounds: How many rounds count.
    """
    last = -1
    for index, row in enumerate(rows):
        if row["event"] not in _OF_ROUNDS:
            continue
        number = row["rounds"] - 1 if row["event"] == "checkpoint" else row["round"]
        if number >= rounds:
            break
        last = index
    return tuple(rows[: last + 1])
