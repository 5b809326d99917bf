"""A run as read from its folder: who took part, what was idle, what links carried."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from pipar_jax.config.membership_script import Attempt
from pipar_jax.report import make_page, read_run
from pipar_jax.report.run import RecordedRun
from tests.pipar_jax.report.simulated_runs import BATCH, CHAIN, PIPAR, SAMPLES, write_run


def seated(run: RecordedRun, cohorts: list[tuple[int, ...]]) -> RecordedRun:
    """A run in whose rounds other devices had the places: a trace knows the places alone."""
    rounds_ = iter(cohorts)
    rows = []
    for row in run.events:
        if row["event"] == "round_finished":
            names = {f"d{place}": f"d{device}" for place, device in enumerate(next(rounds_))}
            busy = {names.get(host, host): s for host, s in row["busy"].items()}
            ends = ("source", "target")
            links = [link | {end: names.get(link[end], link[end]) for end in ends}
                     for link in row["links"]]  # fmt: skip
            row = {**row, "busy": busy, "links": links}
        rows.append(row)
    joined = [{"event": "device_joined", "device": device, "samples": SAMPLES, "time_s": 0.1}
              for device in range(2, 12)]  # fmt: skip
    attempts = tuple(
        Attempt(index, cohort, ((0, 0, 4), (1, 0, 4)), (), (), (0, 1))
        for index, cohort in enumerate(cohorts)
    )
    return dataclasses.replace(run, events=(*joined, *rows), attempts=attempts)


def test_devices_that_change_places_are_told_from_the_places(tmp_path: Path) -> None:
    whole = read_run(write_run(tmp_path / "run", "pipar", PIPAR))
    run = seated(whole, [(0, 1), (3, 11), (0, 11)])
    assert run.devices == ["d0", "d1", "d3", "d11"]
    page = make_page([run])
    # Each device is idle in the rounds that it took part in, as the only ones in the whole run are.
    shares = {host: run.idle_share(host) for host in run.devices}
    first, second, third = run.of("round_finished")
    assert shares["d3"] == pytest.approx(1 - second["busy"]["d3"] / second["seconds"])
    both_s = first["seconds"] + third["seconds"]
    busy_s = first["busy"]["d0"] + third["busy"]["d0"]
    assert shares["d0"] == pytest.approx(1 - busy_s / both_s)
    assert run.idle_share("d7") is None
    # Causes are those of all places, and none of the idle time is without one.
    assert "PiPar devices, for the network: " in page and "PiPar devices, other: " not in page
    assert "d11 → server" in page  # whose number is that of no place
    assert whole.carried and run.carried == {} and "Traffic by link" not in page
    assert "12 devices, 2 of them in a round" in page and "720 samples on all devices" in page
    assert "Traffic by link" in make_page([seated(whole, [(0, 1)] * 3)])


def test_the_heading_says_what_the_runs_have_in_common_and_each_has_alone(tmp_path: Path) -> None:
    for parent in ("one", "two"):
        (tmp_path / parent).mkdir()
    runs = [read_run(write_run(tmp_path / parent / "run", "pipar", PIPAR)) for parent in
            ("one", "two")]  # fmt: skip
    config = json.loads(json.dumps(runs[1].config))
    config["devices"]["overrides"] = {"1": {"link": "wifi", "slowdown": 5.0}}
    config["data"]["batch_size"] = 8
    page = make_page([runs[0], dataclasses.replace(runs[1], config=config)])
    assert "<p>2 devices, 1,234 parameters, 120 samples per epoch.</p>" in page
    assert f"<p>one/run: links 20/40, batch {BATCH}.</p>" in page
    slow = "links 20/40, wifi, devices slowed down by a factor of 1, 5, batch 8"
    assert f"<p>two/run: {slow}.</p>" in page
    assert "Made by pipar_jax from one/run, two/run." in page
    assert make_page(runs[:1]).count("samples per epoch") == 1


def test_the_most_that_was_queued_in_any_round_is_shown(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run", "pipar", PIPAR))
    first = run.of("round_finished")[0]["links"][0]
    first["queued_peak_bytes"] = 9000
    assert run.traffic[first["source"], first["target"]]["queued_peak_bytes"] == 9000


def test_changes_of_plan_are_seconds_of_training(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run", "pipar", PIPAR))
    rows = list(run.events)
    (at,) = (i for i, row in enumerate(rows)
             if row["event"] == "round_finished" and row["round"] == 1)  # fmt: skip
    rows.insert(at, {"event": "replanned", "round": 1, "plan": "", "to": PIPAR.to_dict(),
                     "seconds": 0.5})  # fmt: skip
    moved = dataclasses.replace(run, events=tuple(rows)).elapsed
    assert moved[0] == run.elapsed[0]
    assert [moved[i] - run.elapsed[i] for i in (1, 2)] == pytest.approx([0.5, 0.5])


def test_rounds_that_were_undone_are_not_compared_with_predictions(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run", "pipar", PIPAR))
    undone = {**run.of("round_finished")[0], "committed": 0, "seconds": 1000.0}
    rows = []
    for row in run.events:
        rows += [undone] * 4 if row["event"] == "round_finished" else []
        rows.append(row)
    section = make_page([dataclasses.replace(run, events=tuple(rows))])
    section = section.partition("<h2>Predicted and measured</h2>")[2]
    assert "1,000" not in section.partition("</section>")[0]


def test_weights_of_a_chain_are_what_its_devices_sent_besides(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run", "mpsl", CHAIN))
    sent = (sums["bytes"] for ends, sums in run.traffic.items() if ends[1] == "server"
            and ends[0] in run.devices)  # fmt: skip
    assert run.weight_bytes == pytest.approx(sum(sent) / 6)
