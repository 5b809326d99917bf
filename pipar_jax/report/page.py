"""The page: sections of tables and charts over one or several runs."""

from __future__ import annotations

import collections
import html
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipar_jax.disk.files import write_text
from pipar_jax.errors import DiskError, PlanError
from pipar_jax.report.assets import SCRIPT, STYLE
from pipar_jax.report.bars import byte_bars, idle_bars
from pipar_jax.report.gantt import gantt_charts
from pipar_jax.report.run import Run, links_of, read_run
from pipar_jax.report.svg import Series, digits, legend, line_chart
from pipar_jax.schedule.plan import COORDINATOR


def write_report(folders: Sequence[Path], target: Path) -> None:
    """Reads runs and writes their report.

    Args:
      folders: Folders of runs, at least one.
      target: The file to write.

    Raises:
      DiskError: The file cannot be written.
      RunError: A folder cannot be read.
    """
    page = make_page([read_run(folder) for folder in folders])
    try:
        write_text(target, page, "choose another file with --output")
    except DiskError as error:
        raise DiskError(f"the report cannot be written: {error}") from error


def make_page(runs: Sequence[Run]) -> str:
    """Returns the page as one HTML document.

    Args:
      runs: At least one run.
    """
    names = _names(runs)
    settings = {str(run.config["model"]["name"]) + " on " + str(run.config["data"]["source"])
                for run in runs}  # fmt: skip
    heading = f"{', '.join(names)}: {', '.join(sorted(settings))}"
    sections = [
        _section("Results", "Idle is the share of the rounds in which a host computed nothing; "
                 "compilation and evaluation belong to no round.", _results(runs, names)),
        _section("Learning", "Against epochs methods show whether they learn the same; against "
                 "seconds of training, what their speed is worth.", _curves(runs, names)),
        _section("One step", "Wide bars are computations, light forwards and dark backwards; thin "
                 "bars below them are messages being sent. A colour is a micro-batch; point at one "
                 "to follow it. Other steps are faded. Below what was measured stands what the "
                 "simulator predicts from the run's median times, in the same scale.",
                 "".join(map(gantt_charts, runs))),
        _section("Idle time", "Each second that a host did not compute, by what it waited for "
                 "along the critical path.", idle_bars(runs, names)),
        _section("Links", "On the wire, headers and heartbeats included, in all rounds. A message "
                 "waits from the moment it is sent until its first byte leaves: behind others, for "
                 "credit of a receiver that is behind, or for a socket that takes nothing.",
                 byte_bars(runs, names) + _links(runs, names)),
        _section("Predicted and measured", "The simulator's prediction of a round from the "
                 "medians of the run's own times, beside what was measured: the difference is what "
                 "a schedule without disturbances would have saved. Where the tuner chose the "
                 "plan, what it predicted of an epoch before the run is compared as well.",
                 _predictions(runs, names)),
        _section("Configuration", "", _configurations(runs, names)),
    ]  # fmt: skip
    body = "".join(sections)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(heading)}</title><style>{STYLE}</style></head><body><main>"
        f"<h1>{html.escape(heading)}</h1><p>{html.escape(_facts(runs))}</p>{body}"
        f"<footer>Written by pipar_jax from {html.escape(', '.join(run.name for run in runs))}."
        f"</footer></main><script>{SCRIPT}</script></body></html>\n"
    )


def _section(title: str, about: str, content: str) -> str:
    """Returns a section, or nothing if it would be empty."""
    if not content:
        return ""
    words = f"<p>{html.escape(about)}</p>" if about else ""
    return f"<section><h2>{html.escape(title)}</h2>{words}{content}</section>"


def _names(runs: Sequence[Run]) -> list[str]:
    """Returns what each run is called: its method, or its folder where methods repeat."""
    counts = collections.Counter(run.title for run in runs)
    return [run.title if counts[run.title] == 1 else run.name for run in runs]


def _facts(runs: Sequence[Run]) -> str:
    """Returns a line about the setting that the first run had."""
    run = runs[0]
    started = run.last("run_started")
    devices = run.config["devices"]["defaults"]
    parts = [f"{started.get('devices', run.config['devices']['count'])} devices"]
    if devices.get("link", "none") != "none":
        parts.append(f"links {devices['link']}")
    if devices.get("slowdown", 1.0) != 1.0:
        parts.append(f"devices {devices['slowdown']:g} times slower")
    if started:
        parts.append(f"{started['parameters']:,} parameters")
    if samples := run.samples_per_epoch():
        parts.append(f"{samples:,} samples per epoch")
    parts.append(f"batch {run.config['data']['batch_size']}")
    return ", ".join(parts) + "."


def _table(head: Iterable[str], rows: Iterable[tuple[str, Sequence[str]]], words: int = 1) -> str:
    """Returns a table; rows are pairs of a class and cells, the first ``words`` of them texts."""

    def cells(tag: str, values: Iterable[str]) -> str:
        return "".join(
            f"<{tag}{' class=words' if i < words else ''}>{html.escape(value)}</{tag}>"
            for i, value in enumerate(values)
        )

    body = "".join(
        f"<tr{f' class={kind}' if kind else ''}>{cells('td', values)}</tr>" for kind, values in rows
    )
    return f"<table><thead><tr>{cells('th', head)}</tr></thead><tbody>{body}</tbody></table>"


def _results(runs: Sequence[Run], names: Sequence[str]) -> str:
    """Returns the table of the methods' results."""
    base = next((run for run in runs if run.title == "FL"), runs[0])
    base_name = names[runs.index(base)]
    fastest = min((run for run in runs if run.epoch_s), key=lambda run: run.epoch_s, default=None)
    rows = []
    for run, name in zip(runs, names, strict=True):
        summary, score = run.last("run_finished"), run.last("evaluated")
        done = run.of("round_finished")
        idle = [run.idle_share(host) for host in run.devices]
        idle_known = [share for share in idle if share is not None]
        server = run.idle_share(COORDINATOR)
        speed = base.epoch_s / run.epoch_s if run.epoch_s and base.epoch_s else None
        cells = [
            name if run.finished else f"{name} (did not finish)",
            run.plan_text,
            digits(run.epoch_s) if run.epoch_s else "–",
            f"{speed:.2f}×" if speed else "–",
            f"{server:.0%}" if server is not None else "–",
            f"{statistics.fmean(idle_known):.0%}" if idle_known else "–",
            digits(sum(row["bytes_up"] for row in done) / 1e6),
            digits(sum(row["bytes_down"] for row in done) / 1e6),
            f"{(summary or score)['accuracy']:.1%}" if score else "–",
        ]
        rows.append(("best" if run is fastest and len(runs) > 1 else "", cells))
    head = ("method", "plan", "seconds per epoch", f"speed-up over {base_name}", "server idle",
            "devices idle", "MB up", "MB down", "test accuracy")  # fmt: skip
    return _table(head, rows, words=2)


def _curves(runs: Sequence[Run], names: Sequence[str]) -> str:
    """Returns the learning curves: accuracy and loss, against epochs and seconds."""

    def percent(value: float) -> str:
        return f"{value:.4g}%"

    charts = []
    kinds: list[tuple[str, str, str, float, Callable[[float], str]]] = [
        ("Test accuracy", "evaluated", "accuracy", 100.0, percent),
        ("Training loss", "round_finished", "loss", 1.0, digits),
    ]
    for title, event, field, factor, show in kinds:
        for axis in ("epochs", "seconds"):
            series = [
                Series(name, hue, [(_x(run, row, axis), row[field] * factor)
                                   for row in run.of(event) if row[field] is not None])
                for hue, (run, name) in enumerate(zip(runs, names, strict=True))
            ]  # fmt: skip
            charts.append(line_chart(title, axis, [one for one in series if one.points],
                                     show=show))  # fmt: skip
    if not any(charts):
        return ""
    named = legend([(f"hue{hue % 8}", name) for hue, name in enumerate(names)])
    return f'{named}<div class="pair">{"".join(charts)}</div>'


def _x(run: Run, row: Mapping[str, Any], axis: str) -> float:
    """Returns how far training had come at a row, in epochs or in seconds of training."""
    return float(row["epoch"] if axis == "epochs" else run.elapsed.get(row["round"], 0.0))


def _predictions(runs: Sequence[Run], names: Sequence[str]) -> str:
    """Returns the table of predicted and measured rounds."""
    rows = []
    for run, name in zip(runs, names, strict=True):
        schedule = run.schedule()
        try:
            found = run.predict()
        except PlanError as error:
            rows.append(("", [name, f"cannot be predicted: {error}", *[""] * 6]))
            continue
        done = run.of("round_finished")
        if found is None or schedule is None or not done:
            continue
        measured = statistics.median(row["seconds"] for row in done)
        error_share = found.seconds / measured - 1.0
        loads = dict(found.busy_s)
        for ends, nbytes in found.carried_bytes.items():
            loads[f"{ends[0]} → {ends[1]}"] = run.link_of(ends).occupied_s(nbytes)
        binding = max(loads, key=lambda key: loads[key])
        server = run.idle_share(COORDINATOR)
        tuned = run.last("tuned").get("epoch_s")  # before the run, from the profile
        rows.append(
            ("", [
                name, f"{binding}, busy {loads[binding] / found.seconds:.0%}",
                digits(measured), digits(found.seconds), f"{error_share:+.1%}",
                f"{tuned / run.epoch_s - 1:+.1%}" if tuned and run.epoch_s else "–",
                f"{server:.0%}" if server is not None else "–",
                f"{found.idle_share(COORDINATOR):.0%}",
            ])
        )  # fmt: skip
    if not rows:
        return ""
    head = ("method", "what binds", "seconds per round", "predicted", "difference",
            "tuner's, per epoch", "server idle", "predicted")  # fmt: skip
    return _table(head, rows, words=2)


def _links(runs: Sequence[Run], names: Sequence[str]) -> str:
    """Returns the table of what each direction of each link carried and waited for."""
    rows = []
    for run, name in zip(runs, names, strict=True):
        shown = links_of(run)
        for ends in shown:
            one = run.traffic[ends]
            cells = [
                f"{name} {ends[0]} → {ends[1]}",
                digits(one["bytes"] / 1e6),
                f"{one['payload_bytes'] / one['raw_bytes']:.0%}" if one["raw_bytes"] else "–",
                f"{one['messages']:,.0f}",
                digits(one["queue_s"] / one["messages"] * 1e3) if one["messages"] else "–",
                digits(one["queued_peak_bytes"] / 1e3),
                f"{one['credit_wait_s']:.2f}",
                f"{one['blocked_s']:.2f}",
                digits(one["rtt_s"] * 1e3) if "rtt_s" in one else "–",
                digits(one["rate_mbps"]) if "rate_mbps" in one else "–",
                f"{one['reconnects']:.0f} ({digits(one['repeated_bytes'] / 1e3)} kB)"
                if one["reconnects"]
                else "–",
            ]
            rows.append(("", cells))
        if left := len(run.traffic) - len(shown):
            rows.append(("", [f"{name}: {left} more in metrics.jsonl", *[""] * 10]))
    if not rows:
        return ""
    head = ("link", "MB", "size after codec", "messages", "mean wait, ms", "most queued, kB",
            "no credit, s", "socket full, s", "round trip, ms", "Mbit/s measured",
            "cut (repeated)")  # fmt: skip
    return _table(head, rows)


def _configurations(runs: Sequence[Run], names: Sequence[str]) -> str:
    """Returns the configurations side by side, what differs first and marked."""
    flat = [_flatten(run.config) for run in runs]
    fields = list(dict.fromkeys(field for one in flat for field in one))
    rows = []
    for field in fields:
        values = [one.get(field, "–") for one in flat]
        differs = len(set(values)) > 1
        shown = values if differs or len(runs) == 1 else [values[0], *[""] * (len(runs) - 1)]
        rows.append(("differs" if differs else "", [field, *shown]))
    rows.sort(key=lambda row: row[0] == "")
    table = _table(["field", *names], rows, words=1 + len(runs))
    return f"<details><summary>{len(rows)} fields</summary>{table}</details>"


def _flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Returns every field by its dotted name, as text; secrets are left out."""
    found: dict[str, str] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            found.update(_flatten(value, f"{prefix}{key}."))
        elif key == "token":
            found[f"{prefix}{key}"] = "–" if value is None else "(hidden)"
        else:
            found[f"{prefix}{key}"] = str(value)
    return found
