"""The report: from runs' folders to one HTML file that needs nothing else, also in a browser."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from pipar_jax.config.membership_script import Attempt, Out
from pipar_jax.errors import RunError
from pipar_jax.report import make_page, read_run, write_report
from pipar_jax.report.bars import Bar, stacked_bars
from pipar_jax.report.gantt import median_step
from pipar_jax.report.idle import CAUSES
from pipar_jax.report.membership import membership_rows, membership_text
from pipar_jax.report.run import RecordedRun, hosts_of
from pipar_jax.report.svg import Series, aligned, digits, line_chart, tick_labels, ticks
from pipar_jax.schedule.actions import KIND_NAMES, parse
from pipar_jax.schedule.plan import DevicePlan, Plan
from pipar_jax.schedule.trace import Interval, Timed, Trace
from tests.patience import PROCESS_S
from tests.pipar_jax.report.simulated_runs import CHAIN, FL, PIPAR, SAMPLES, SL, write_run

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    return [
        write_run(tmp_path / "demo-fl", "fl", FL),
        write_run(tmp_path / "demo-sl", "sl", SL),
        write_run(tmp_path / "demo-pipar", "pipar", PIPAR),
    ]


class Checker(HTMLParser):
    """Collects what a page refers to, and checks that its elements are closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.references: list[str] = []
        self.seen: dict[str, int] = {}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen[tag] = self.seen.get(tag, 0) + 1
        self.references += [value or "" for key, value in attrs if key in ("src", "href")]
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_and_needs_nothing_else(folders: list[Path]) -> None:
    page = make_page([read_run(folder) for folder in folders])
    checker = Checker()
    checker.feed(page)
    checker.close()
    assert not checker.open
    assert not checker.references
    assert "://" not in page and "@import" not in page and "url(" not in page
    for title in ("Results", "Learning", "One step", "Idle time", "Links",
                  "Predicted and measured", "Configuration"):  # fmt: skip
        assert f"<h2>{title}</h2>" in page
    # Curves, a step of each run as measured and as predicted, two charts of bars.
    assert checker.seen["svg"] == 4 + 2 * 3 + 2
    assert "secret-token" not in page


def test_figures_of_the_runs_are_in_the_table(folders: list[Path]) -> None:
    runs = [read_run(folder) for folder in folders]
    page = make_page(runs)
    fl, _, pipar = runs
    assert f"{fl.epoch_s / pipar.epoch_s:.2f}×" in page
    assert "device|1|server x4" in page
    assert f"{pipar.idle_share('server'):.0%}" in page
    assert "80.0%" in page
    assert "d1.1L0@" in page
    assert "PiPar, measured: step" in page and "PiPar, predicted: step" in page


def test_a_prediction_from_a_runs_own_times_is_its_time(folders: list[Path]) -> None:
    for folder in folders:
        run = read_run(folder)
        found = run.predict()
        assert found is not None
        measured = run.of("round_finished")[-1]["seconds"]
        assert found.seconds == pytest.approx(measured, rel=1e-3)


def test_a_chain_is_predicted_with_the_links_of_its_nodes(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "demo-mpsl", "mpsl", CHAIN))
    rates = {ends: link.rate_bytes_s for ends, link in run.links.items()}
    assert rates["n1", "n2"] == rates["n2", "n1"] == 3e6 / 8
    assert (rates["d0", "n1"], rates["n2", "d1"]) == (20e6 / 8, 40e6 / 8)
    found, measured = run.predict(), run.of("round_finished")[-1]["seconds"]
    assert found is not None and found.seconds == pytest.approx(measured, rel=0.01)
    config = json.loads(json.dumps(run.config))
    config["nodes"]["defaults"]["link"] = "none"
    free = dataclasses.replace(run, config=config).predict()
    assert free is not None and free.seconds < 0.97 * measured


def test_what_the_tuner_predicted_stands_beside_the_epoch(folders: list[Path]) -> None:
    run = read_run(folders[-1])
    tuned = {"event": "tuned", "plan": "", "epoch_s": 1.5 * run.epoch_s}
    page = make_page([dataclasses.replace(run, events=(tuned, *run.events))])
    assert "<td>+50.0%</td>" in page
    assert "<td>+50.0%</td>" not in make_page([run])


def test_idle_causes_cover_the_idle_time(folders: list[Path]) -> None:
    run = read_run(folders[-1])
    whole = sum(row["seconds"] for row in run.of("round_finished"))
    for host in ("server", "d0", "d1"):
        share = run.idle_share(host)
        assert share is not None
        assert sum(run.causes[host].values()) == pytest.approx(share * whole)
    assert set(run.causes["d0"]) == set(CAUSES)


def test_bytes_add_up_to_what_the_rounds_reported(folders: list[Path]) -> None:
    run = read_run(folders[-1])
    up = sum(row["bytes_up"] for row in run.of("round_finished"))
    tensors = sum(sum(n.values()) for ends, n in run.carried.items() if ends[1] == "server")
    assert tensors == 2 * 3 * SAMPLES * 500
    assert run.weight_bytes == pytest.approx((up - tensors) / 6) == 20_000


def test_what_links_carried_and_waited_for_is_added_up(folders: list[Path]) -> None:
    run = read_run(folders[-1])
    up = run.traffic["d0", "server"]
    assert (up["messages"], up["queue_s"], up["repeated_bytes"]) == (30, 1.5, 900)
    assert (up["queued_peak_bytes"], up["reconnects"]) == (7000, 1)  # no sums
    whole = sum(row["bytes_up"] + row["bytes_down"] for row in run.of("round_finished"))
    assert sum(one["bytes"] for one in run.traffic.values()) == pytest.approx(whole)
    page = make_page([run])
    found = [cell.strip("\u2007\u2008") for cell in re.findall(r"<td[^>]*>([^<]*)</td>", page)]
    cells = ["PiPar d0 → server", f"{up['bytes'] / 1e6:.3f}", "50%", "30", "50.0", "7.00", "0.75",
             "0.00", "–", "17.5", "1 (0.9 kB)"]  # fmt: skip
    first = found.index(cells[0])
    assert found[first : first + len(cells)] == cells


def test_of_many_links_those_of_the_first_devices_are_shown(tmp_path: Path) -> None:
    plan = Plan((DevicePlan((1,), ("device", "server"), 4),) * 12)
    page = make_page([read_run(write_run(tmp_path / "many", "pipar", plan))])
    assert "d7 → server" in page and "d8 → server" not in page
    assert "PiPar: 8 more in metrics.jsonl" in page


def test_runs_that_did_not_finish_or_kept_no_trace_are_shown(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "broken", "pipar", PIPAR, finish=False)
    (folder / "trace.json.gz").unlink()
    page = make_page([read_run(folder)])
    assert "PiPar (did not finish)" in page
    assert "<h2>One step</h2>" not in page
    assert "<h2>Idle time</h2>" in page  # from the rounds' sums, without causes
    (folder / "metrics.jsonl").write_text("")
    assert "<h2>Configuration</h2>" in make_page([read_run(folder)])


def test_methods_that_repeat_are_called_by_their_folders(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / name, "pipar", PIPAR) for name in ("one", "two")]
    page = make_page([read_run(folder) for folder in folders])
    assert "<h1>one, two: " in page


def test_runs_whose_folders_have_one_name_are_told_apart(tmp_path: Path) -> None:
    for parent in ("one", "two"):
        (tmp_path / parent).mkdir()
    folders = [write_run(tmp_path / parent / "run", "pipar", PIPAR) for parent in ("one", "two")]
    page = make_page([read_run(folder) for folder in (*folders, folders[0])])
    assert "<h1>run (1), two/run, run (3): " in page
    for name in ("run (1)", "two/run", "run (3)"):
        assert f"{name}, measured: step" in page


@pytest.mark.parametrize("letters", [1, 49, 50, 51, 100, 255])
def test_bars_have_room_however_long_names_are(letters: int) -> None:
    bars = [Bar("x" * letters, [("busy", 2.0)]), Bar("short", [("busy", 1.0)])]
    chart = stacked_bars("Title", "seconds", bars, str)
    widths = [float(width) for width in re.findall(r'<rect x="[^"]*" y="[^"]*" width="([^"]*)"',
                                                   chart)]  # fmt: skip
    assert len(widths) == 2 and widths[0] == pytest.approx(2 * widths[1], rel=0.01)
    assert 100 < widths[0] < 900


def test_a_run_that_ended_within_an_epoch_is_no_faster_for_it(tmp_path: Path) -> None:
    """A tenth of an epoch in one second is ten seconds an epoch, and no run that has been won."""
    whole = read_run(write_run(tmp_path / "whole", "pipar", PIPAR))
    folder = write_run(tmp_path / "part", "pipar", PIPAR, finish=False)
    rows = [row for row in read_run(folder).events if row["event"] == "round_finished"]
    short = {**rows[0], "epoch": 0.1, "seconds": whole.epoch_s / 100}
    part = dataclasses.replace(read_run(folder), events=(*read_run(folder).events[:3], short))
    assert part.epoch_s == pytest.approx(whole.epoch_s / 10)
    page = make_page([part, whole])
    best = re.findall(r"<tr class=best><td[^>]*>([^<]*)", page)
    assert best == ["whole"]
    undone = {**short, "committed": 0, "epoch": 1.0}
    part = dataclasses.replace(part, events=(*part.events, undone))
    assert part.epoch_s == pytest.approx((short["seconds"] * 2) / 0.1)


def replanned(run: RecordedRun, plan: Plan) -> RecordedRun:
    """A run that changed its plan after the first round."""
    row = {"event": "replanned", "round": 1, "plan": str(plan), "to": plan.to_dict(),
           "seconds": 0.5}  # fmt: skip
    return dataclasses.replace(run, events=(*run.events, row))


def test_a_run_that_changed_its_plan_has_both_and_no_prediction(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run", "pipar", PIPAR))
    other = Plan((DevicePlan((2,), ("device", "server"), 2),) * 2)
    changed = replanned(run, other)
    page = make_page([changed])
    assert "device|1|server x4, then device|2|server x2" in page
    assert "cannot be predicted: the plan changed in the run" in page
    assert "PiPar, measured: step" in page and "PiPar, predicted" not in page
    assert changed.carried == run.carried  # the same hosts, so the same links
    again = replanned(replanned(changed, PIPAR), other)
    assert "x4, 2 more, then device|2|server x2" in make_page([again])


def test_bytes_are_not_called_what_nobody_knows(tmp_path: Path) -> None:
    """After a node is gone another host has its stage: a trace does not say since when."""
    run = read_run(write_run(tmp_path / "run", "mpsl", CHAIN))
    shorter = Plan((DevicePlan((1, 3), ("device", "n1", "device"), 2),) * 2, weights="shared",
                   in_flight=2)  # fmt: skip
    assert run.carried and "Traffic by link" in make_page([run])
    changed = replanned(run, shorter)
    assert changed.carried == {} and "Traffic by link" not in make_page([changed])
    assert "MP-SL d0 → n1" in make_page([changed])  # in the table of all bytes


def test_nodes_and_lost_devices_are_shown_without_a_trace(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", "mpsl", CHAIN)
    (folder / "trace.json.gz").unlink()
    run = read_run(folder)
    assert hosts_of(run) == ["d0", "d1", "n1", "n2", "server"]
    page = make_page([run])
    assert "MP-SL n1" in page and "more in metrics.jsonl" not in page
    rows = [dict(row) for row in run.events]
    last = [row for row in rows if row["event"] == "round_finished"][-1]
    last["busy"] = {host: value for host, value in last["busy"].items() if host != "d0"}
    lost = dataclasses.replace(run, events=tuple(rows))
    assert hosts_of(lost) == ["d0", "d1", "n1", "n2", "server"]


def test_a_recorded_link_that_is_gone_leaves_the_rest_of_the_page(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run", "pipar", PIPAR))
    config = json.loads(json.dumps(run.config))
    config["devices"]["overrides"] = {"1": {"link": f"trace:{tmp_path / 'gone.csv'}"}}
    page = make_page([dataclasses.replace(run, config=config)])
    assert "cannot be predicted: the link of device 1: " in page
    assert "PiPar, measured: step" in page


def test_names_are_escaped(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / name, "pipar", PIPAR) for name in ("<b>x", "y")]
    page = make_page([read_run(folder) for folder in folders])
    assert "<b>x" not in page
    assert "&lt;b&gt;x" in page


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"nothing is not the folder of a run"):
        read_run(tmp_path / "nothing")
    folder = write_run(tmp_path / "run", "fl", FL)
    with pytest.raises(RunError, match="cannot be written"):
        write_report([folder], tmp_path / "missing" / "report.html")
    (folder / "metrics.jsonl").write_text('{"event": "half\n{"event": "whole"}\n')
    with pytest.raises(RunError, match="is not the folder of a run"):
        read_run(folder)


def disturb(folder: Path, script: list[Attempt], rows: dict[int, list[dict[str, object]]]) -> None:
    """Add to a run's folder a script, and events before the end of some of its rounds."""
    events = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    ends = [i for i, row in enumerate(events) if row["event"] == "round_finished"]
    for index in sorted(rows, reverse=True):
        events[ends[index] : ends[index]] = rows[index]
    rounds_ = (row for row in events if row["event"] == "round_finished")
    for row, one in zip(rounds_, script, strict=True):
        taking = len({place for place, _, _ in one.spans})
        row.update(round=one.round, devices=taking, committed=len(one.commit), seconds=2.0)
        row["seconds"] += 5.0 if one.out else 0.0
    lines = "".join(json.dumps(row) + "\n" for row in events)
    (folder / "metrics.jsonl").write_text(lines)
    text = "".join(json.dumps(one.to_dict()) + "\n" for one in script)
    (folder / "membership.jsonl").write_text(text + '{"round": 1, "coh')


def dropped(device: int, why: str) -> dict[str, object]:
    return {"event": "device_dropped", "device": device, "round": 1, "step": 4, "steps": 4,
            "why": why, "reason": ""}  # fmt: skip


def test_who_was_out_and_who_came_back_is_shown_with_what_it_cost(tmp_path: Path) -> None:
    """Three attempts: an undisturbed one, one with losses, one before which a device came back."""
    run = write_run(tmp_path / "open", "pipar", PIPAR)
    calm = Attempt(0, (0, 1), ((0, 0, 4), (1, 0, 4)), (), (), (0, 1))
    lost = Attempt(1, (0, 1), ((0, 4, 8), (1, 4, 8)), (), (Out(1, 6, "lost"),), (0,))
    disturb(
        run, [calm, lost, dataclasses.replace(calm, round=2)],
        {1: [{"event": "device_lost", "device": 1, "reason": "gone"}, dropped(1, "lost")],
         2: [{"event": "device_returned", "device": 1, "samples": 60, "away_s": 12.34}]},
    )  # fmt: skip
    read = read_run(run)
    assert membership_rows(read) == [
        ["2", "1 of 2", "d1 lost from step 3 of 4", "", 7.0, 5.0],
        ["3", "2 of 2", "", "d1 after 12.3 s", 2.0, 0.0],
    ]
    assert membership_text(read) == (
        "devices left out of a round: 1; devices lost: 1; returns: 1; more seconds than in as many "
        "undisturbed rounds: 5.0."
    )
    page = make_page([read])
    assert page.count("<h2>Membership</h2>") == 1 and "d1 lost from step 3 of 4" in page


def test_a_late_device_that_takes_part_again_is_shown(tmp_path: Path) -> None:
    run = write_run(tmp_path / "late", "pipar", PIPAR)
    late = Attempt(0, (0, 1), ((0, 0, 4), (1, 0, 4)), (), (Out(1, 0, "late"),), (0,))
    alone = Attempt(1, (0, 1), ((0, 4, 8),), (), (), (0,))
    both = Attempt(2, (0, 1), ((0, 8, 12), (1, 0, 4)), (), (), (0, 1))
    disturb(run, [late, alone, both], {0: [dropped(1, "late")]})
    assert membership_rows(read_run(run)) == [
        ["1", "1 of 2", "d1 late, no step counts", "", 7.0, 5.0],
        ["3", "2 of 2", "", "d1 again, out since round 1", 2.0, 0.0],
    ]


def test_a_round_that_was_undone_costs_all_its_time(tmp_path: Path) -> None:
    run = write_run(tmp_path / "undone", "pipar", PIPAR)
    calm = Attempt(0, (0, 1), ((0, 0, 4), (1, 0, 4)), (), (), (0, 1))
    out = (Out(1, 4, "late"), Out(0, 4, "undone"))
    undone = Attempt(1, (0, 1), ((0, 4, 8), (1, 4, 8)), (), out, ())
    disturb(run, [calm, undone, dataclasses.replace(calm, round=1)], {1: [dropped(1, "late")]})
    assert membership_rows(read_run(run)) == [
        ["2, undone", "0 of 2", "d1 late, no step counts", "", 7.0, 7.0],
    ]


def test_a_run_in_which_nothing_happened_has_no_section_on_membership(folders: list[Path]) -> None:
    assert "<h2>Membership</h2>" not in make_page([read_run(folder) for folder in folders])


def test_a_script_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    run = write_run(tmp_path / "odd", "pipar", PIPAR)
    (run / "membership.jsonl").write_text('{"round": -1}\n')
    with pytest.raises(RunError, match=r"membership\.jsonl is not a script of rounds"):
        read_run(run)


def test_the_usual_step_is_neither_the_first_nor_the_last() -> None:
    rows = [
        Timed(parse(f"d0.0L0@{step}"), start, start + length)
        for step, start, length in [(0, 0, 9), (1, 10, 3), (2, 20, 5), (3, 30, 4), (4, 40, 1)]
    ]
    trace = Trace({"d0": rows}, [Interval(0, 50)])
    window = median_step(trace)
    assert window is not None
    assert (window.step, window.interval) == (3, Interval(30, 34))
    assert median_step(Trace()) is None


def test_axes_have_round_numbers() -> None:
    assert ticks(0, 1) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert ticks(3.1, 17) == pytest.approx([5, 10, 15])
    assert ticks(2, 2) == [2]
    assert [digits(x) for x in (0, 1234567, 12.345, 0.00123, 100)] == [
        "0", "1,234,567", "12.3", "0.00123", "100",
    ]  # fmt: skip
    assert line_chart("nothing", "x", []) == ""
    chart = line_chart("one", "x", [Series("a", 0, [(1.0, 5.0)])])
    assert chart.count("<circle") == 1
    assert "<polyline" not in chart


@pytest.mark.parametrize(("points", "markers"), [(2, 2), (40, 40), (41, 0), (500, 0)])
def test_a_line_of_many_points_has_no_markers(points: int, markers: int) -> None:
    line = Series("a", 0, [(float(x), float(x)) for x in range(points)])
    chart = line_chart("one", "x", [line])
    assert chart.count("<circle") == markers
    assert chart.count("<polyline") == 1


def test_numbers_of_a_column_have_their_points_in_line() -> None:
    numbers = aligned([2.5, 2.7, 0.142, 1234.0, None, 0.0, 61.6])
    assert [number.rstrip("\u2007\u2008") for number in numbers] == [
        "2.50", "2.70", "0.142", "1,234", "–", "0", "61.6",
    ]  # fmt: skip
    # A figure space is as wide as a digit, a punctuation space as wide as the point.
    widths = str.maketrans({"\u2007": "0", "\u2008": "."})
    assert {len(n.translate(widths).partition(".")[2]) for n in numbers} == {3}
    assert aligned([]) == []


def test_labels_of_an_axis_have_the_decimals_of_its_step() -> None:
    assert tick_labels(ticks(0.4, 2.1)) == ["0.5", "1.0", "1.5", "2.0"]
    assert tick_labels(ticks(2.3012, 2.3019)) == ["2.3012", "2.3014", "2.3016", "2.3018"]
    assert tick_labels([0, 500, 1000]) == ["0", "500", "1,000"]
    assert tick_labels([2.0]) == ["2"]


def test_the_legend_spells_out_every_action_that_is_drawn(folders: list[Path]) -> None:
    page = make_page([read_run(folder) for folder in folders])
    steps = page[page.index("<h2>One step</h2>") : page.index("<h2>Idle time</h2>")]
    legend = steps[: steps.index("<svg")]
    for kind in ("F", "B", "L", "U", "A"):
        assert f">{kind}</span>{KIND_NAMES[kind]}</li>" in legend
    for kind in ("SF", "SB"):
        assert f"></span>{KIND_NAMES[kind]}</li>" in legend
    letters = set(re.findall(r">([A-Z])\d*</text>", steps))
    assert letters <= set(re.findall(r">([A-Z])</span>", legend))


@pytest.mark.browser
def test_a_browser_draws_the_page_without_complaint(folders: list[Path], tmp_path: Path) -> None:
    browser = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if browser is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is on this machine")
    report = tmp_path / "report.html"
    write_report(folders, report)
    # What the page looks like once its script has run: a probe adds what it measures.
    probe = """<script>
      const errors = []; window.addEventListener("error", (e) => errors.push(e.message));
      const bar = document.querySelector("svg [data-key]");
      bar.dispatchEvent(new PointerEvent("pointerover", {bubbles: true}));
      const boxes = [...document.querySelectorAll("svg")].map((s) => s.getBoundingClientRect());
      const texts = [...document.querySelectorAll("svg")].every((s) => {
        const frame = s.getBoundingClientRect();
        return [...s.querySelectorAll("text")].every((t) => {
          const box = t.getBoundingClientRect();
          return box.left >= frame.left - 2 && box.right <= frame.right + 2; }); });
      window.dispatchEvent(new Event("beforeprint"));
      document.title = JSON.stringify({errors, texts,
        drawn: boxes.filter((b) => b.width > 300 && b.height > 60).length,
        picked: document.querySelectorAll("svg.picked").length,
        same: document.querySelectorAll("svg.picked [data-key].picked").length,
        folded: document.querySelectorAll("details:not([open])").length,
        wide: document.documentElement.scrollWidth > window.innerWidth});
    </script></body>"""
    report.write_text(report.read_text().replace("</body>", probe))
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
               "--disable-background-networking", "--disable-sync", "--window-size=1100,900",
               f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=3000",
               "--dump-dom", report.as_uri()]  # fmt: skip
    shown = subprocess.run(
        command, capture_output=True, text=True, timeout=PROCESS_S, check=True
    ).stdout
    title = re.search(r"<title>(\{.*?\})</title>", shown)
    assert title is not None, shown[:500]
    found = json.loads(title[1].replace("&quot;", '"'))
    assert found == {"errors": [], "texts": True, "drawn": 12, "picked": 1, "same": found["same"],
                     "folded": 0, "wide": False}  # fmt: skip
    assert found["same"] >= 1


def test_a_run_without_a_full_round_has_no_prediction(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run", "pipar", PIPAR))
    alone = dataclasses.replace(run, events=())
    assert alone.predict() is None
    assert alone.epoch_s == 0.0


def test_a_folder_with_a_configuration_of_something_else_is_no_run(tmp_path: Path) -> None:
    """Whatever it lacks, it is named; or the page does without."""
    folder = write_run(tmp_path / "run", "pipar", PIPAR)
    whole = json.loads((folder / "config.json").read_text())

    def without(config, path):
        made = json.loads(json.dumps(config))
        *groups, last = path
        inner = made
        for group in groups:
            inner = inner[group]
        del inner[last]
        return made

    paths = [(key,) for key in whole] + [
        (key, inner) for key, value in whole.items() if isinstance(value, dict) for inner in value
    ]
    shown = 0
    for config in ([], 3, "text", {}, {"model": {}}, *(without(whole, path) for path in paths)):
        (folder / "config.json").write_text(json.dumps(config))
        try:
            shown += bool(make_page([read_run(folder)]))
        except RunError as error:
            assert "config.json has no field" in str(error)
    assert shown > len(paths) / 2
