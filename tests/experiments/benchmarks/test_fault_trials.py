"""The benchmark of faults: what it draws, and short forms of its trials in real processes."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from experiments.benchmarks import fault_trials, population_trials, watched
from experiments.benchmarks.fault_trials import LAUNCHER, PHASES, Kill
from experiments.benchmarks.population_trials import Crowd
from pipar_jax.config import AUTO
from pipar_jax.methods.registry import METHODS
from pipar_jax.schedule.plan import COORDINATOR
from tests.patience import PROCESS_S
from tests.sources import ROOT


def test_kills_reach_every_method_every_kind_of_host_and_every_phase():
    kills = fault_trials.draw_kills(120)
    assert kills == fault_trials.draw_kills(120) != fault_trials.draw_kills(120, seed=1)
    assert {one.method for one in kills} == {*METHODS, AUTO}
    assert {one.phase for one in kills} == set(PHASES)
    assert {"d0", "d1", "d2", "n1", "n2", COORDINATOR, LAUNCHER} == {one.victim for one in kills}


@pytest.mark.soak
def test_a_killed_device_is_seen_to_be_left_out_and_no_process_stays(tmp_path):
    kill = Kill("fl", "d1", "training", 2, 0.5)
    outcome = fault_trials.try_kill(tmp_path, kill, 0)
    assert outcome.happened and outcome.went_on and not outcome.orphans, outcome
    assert outcome.on_s is not None and not outcome.lost
    assert not watched.processes_of(tmp_path)


@pytest.mark.soak
def test_a_server_trains_with_fakes_that_come_and_go(tmp_path):
    held = population_trials.train(tmp_path, Crowd(8, 4, 2, 6))
    assert [one.round for one in held] == [1, 2, 3, 4, 5, 6]
    # Of the last ones it may be read after the server has ended.
    assert all(one.usage.resident_bytes > 0 and one.usage.descriptors > 4 for one in held[:3])
    rows = (tmp_path / "fakes8x6" / "metrics.jsonl").read_text().splitlines()
    assert sum(json.loads(row)["event"] == "device_joined" for row in rows) > 4


@pytest.mark.soak
@pytest.mark.parametrize("part", ["kills", "server", "launcher", "cuts", "stops", "rounds"])
def test_the_short_form_of_each_part_meets_its_targets(tmp_path, part):
    file = tmp_path / "rows.json"
    done = subprocess.run(
        [sys.executable, "-m", "experiments.bench_faults", "--quick", f"--only={part}",
         f"--json={file}"],
        capture_output=True, text=True, timeout=4 * PROCESS_S, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    judged = [row for row in json.loads(file.read_text()) if row["met"] is not None]
    # What durations and memory come to is the full form's to judge, on a quiet machine.
    assert judged and all(row["met"] for row in judged if row["unit"] == ""), done.stdout
