"""Adaptation to changing bandwidth against fixed plans, and against the best plan per phase.

``experiments.bench_tuner`` runs it.
"""

from __future__ import annotations

import functools
import itertools
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments.benchmarks import harness, trials
from pipar_jax.config import AUTO, Config
from pipar_jax.cost_model.profile import Profile
from pipar_jax.disk.files import write_text
from pipar_jax.launch import launcher
from pipar_jax.methods.resolution import resolve
from pipar_jax.schedule.plan import Plan
from pipar_jax.simulator.predict import StageCosts, estimate
from pipar_jax.tuner.bounds import DeviceOption
from pipar_jax.tuner.search import search

#: Bandwidths of the phases, and their durations.
PHASES_MBPS, PHASE_S = (50.0, 10.0, 50.0), 60.0
#: Steps per round, and the slowdown of the two devices.
STEPS, SLOWDOWN = 10, 5.0


class Adapting(NamedTuple):
    """Results of adaptation.

    Attributes:
      seconds: Seconds of each run, and of the best plan for each phase, by name.
      to_oracle: Ratio of adaptation to the best plan for each phase.
      to_fixed: Ratio of adaptation to the best fixed plan.
      changes: Texts of the changes.
    """

    seconds: dict[str, float]
    to_oracle: float
    to_fixed: float
    changes: list[str]


def adapting(folder: Path, results: Path, quick: bool = False) -> Adapting:
    """Trains while bandwidth falls and rises: adapting, and under each fixed plan.

    Args:
      folder: Folder of runs and data.
      results: Folder of saved measurements.
      quick: Whether phases are short.
    """
    phase_s = 10.0 if quick else PHASE_S
    mark = f"adapt {phase_s:g}s"
    profiles, best, alone_s = {}, {}, {}
    for mbps in dict.fromkeys(PHASES_MBPS):
        config = _config(folder, f"{mbps:g}/{mbps:g}")
        kept = harness.kept(results, f"{mark} profile {mbps:g}", functools.partial(_survey, config))
        profiles[mbps] = Profile.from_dict(kept)
        best[mbps] = search(profiles[mbps], resolve(config)).plans[0].plan
        measure = functools.partial(_alone, config, profiles[mbps], best[mbps])
        alone_s[mbps] = statistics.median(harness.kept(results, f"{mark} alone {mbps:g}", measure))
    # The amount of work that the best plan of each phase does in its phases.
    rounds = round(sum(phase_s / alone_s[mbps] for mbps in PHASES_MBPS))
    seconds = {"best plan per phase": through_s(alone_s, rounds, phase_s)}
    config = _config(folder, _trace(folder, phase_s))
    config.method, config.tuner.adapt = AUTO, True
    run = functools.partial(_run, config, rounds)
    events = harness.kept(results, f"{mark} adapting {rounds}", run)
    seconds["adapting"] = _seconds(events)
    for plan in _fixed(profiles, best, rounds, phase_s):
        name, config = f"fixed {trials.words(plan)}", _config(folder, _trace(folder, phase_s))
        run = functools.partial(_run, _under(config, plan), rounds)
        seconds[name] = _seconds(harness.kept(results, f"{mark} {name} {rounds}", run))
    least_s = min(s for name, s in seconds.items() if name.startswith("fixed"))
    alone = (f"{m:g} Mbit/s {trials.words(best[m])} {alone_s[m]:.2f} s" for m in alone_s)
    return Adapting(
        seconds,
        seconds["adapting"] / seconds["best plan per phase"],
        seconds["adapting"] / least_s,
        [f"{rounds} rounds of {STEPS} steps; best alone: {', '.join(alone)}", *_changes(events)],
    )


def _config(folder: Path, link: str) -> Config:
    """Returns the configuration of a run with a link."""
    config = trials.base_config(folder, "vgg5", 100, 2, link, STEPS)
    config.devices.defaults.slowdown = SLOWDOWN
    return config


def _trace(folder: Path, phase_s: float) -> str:
    """Writes the bandwidths of the phases; returns the link that follows them."""
    path = folder / f"phases-{phase_s:g}.csv"
    rows = [f"{i * phase_s:g},{mbps:g},{mbps:g}" for i, mbps in enumerate(PHASES_MBPS)]
    write_text(path, "\n".join(["time_s,up_mbps,down_mbps", *rows]) + "\n")
    return f"trace:{path}"


def _survey(config: Config) -> dict[str, Any]:
    return trials.survey(config).to_dict()


def _alone(config: Config, profile: Profile, plan: Plan) -> list[float]:
    """Returns the seconds of rounds under a plan at constant bandwidth."""
    return trials.try_plans(config, profile, [plan] * 3)[plan].seconds


def _fixed(
    profiles: dict[float, Profile], best: dict[float, Plan], rounds: int, phase_s: float
) -> list[Plan]:
    """Returns the fixed plans to run: the best of each phase, and the best compromise."""
    stages = {mbps: StageCosts(profile) for mbps, profile in profiles.items()}
    like = next(iter(best.values()))
    count = len(next(iter(profiles.values())).units)
    options = [
        DeviceOption(0),
        *(DeviceOption(c, n) for c in range(1, count) for n in trials.NUMBERS),
    ]

    def whole_s(option: DeviceOption) -> float:
        plan = trials.common_plan(option, like)
        times = {mbps: estimate(one, plan).epoch_s for mbps, one in stages.items()}
        return through_s(times, rounds, phase_s)

    compromise = trials.common_plan(min(options, key=whole_s), like)
    chosen: dict[str, Plan] = {}
    for plan in (*best.values(), compromise):  # plans that differ only in dispatch count as equal
        chosen.setdefault(trials.words(plan), plan)
    return list(chosen.values())


def through_s(round_s: dict[float, float], rounds: float, phase_s: float) -> float:
    """Returns the seconds of a number of rounds with the durations of their phases."""
    passed_s = 0.0
    for mbps in PHASES_MBPS[:-1]:
        done = phase_s / round_s[mbps]
        if done >= rounds:
            return passed_s + rounds * round_s[mbps]
        rounds, passed_s = rounds - done, passed_s + phase_s
    return passed_s + rounds * round_s[PHASES_MBPS[-1]]


def _under(config: Config, plan: Plan) -> Config:
    """Returns the configuration of a run under a common plan of all devices."""
    one = plan.devices[0]
    config.method, config.pipeline.dispatch = "pipar" if one.cuts else "fl", plan.dispatch
    if one.cuts:
        config.pipeline.cut, config.pipeline.micro_batches = one.cuts[0], one.micro_batches
    return config


def _run(config: Config, rounds: int) -> list[dict[str, Any]]:
    """Trains a number of rounds; returns the relevant events."""
    config.epochs = rounds
    with tempfile.TemporaryDirectory() as folder:
        config.run.dir = folder
        events: list[dict[str, Any]] = []
        launcher.launch(config, on_event=events.append)
    kinds = ("round_finished", "replanned", "run_finished")
    return [event for event in events if event["event"] in kinds]


def _seconds(events: Sequence[dict[str, Any]]) -> float:
    return float(next(e["seconds"] for e in events if e["event"] == "run_finished"))


def _changes(events: Sequence[dict[str, Any]]) -> list[str]:
    """Returns texts of the changes and their times."""
    passed_s = itertools.accumulate(
        event["seconds"] for event in events if event["event"] == "round_finished"
    )
    ends = [0.0, *passed_s]
    return [
        f"after {ends[e['round']]:.0f} s, before round {e['round']}: to "
        f"{trials.words(Plan.from_dict(e['to']))} in {e['seconds']:.2f} s"
        for e in events
        if e["event"] == "replanned"
    ]
