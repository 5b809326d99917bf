"""The HTML page: sections with tables and charts of one or more runs."""

from __future__ import annotations

import collections
import html
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from pipar_jax.disk.event_log import score_of
from pipar_jax.disk.files import RUN_REMEDY, write_text
from pipar_jax.disk.json_text import JsonMapping
from pipar_jax.errors import DiskError, PlanError
from pipar_jax.report.assets import SCRIPT, STYLE
from pipar_jax.report.bars import byte_bars, idle_bars
from pipar_jax.report.event_lines import shorten
from pipar_jax.report.gantt import actions_legend, gantt_charts
from pipar_jax.report.membership import membership_rows, membership_text
from pipar_jax.report.privacy import privacy_text
from pipar_jax.report.run import RecordedRun, links_of, read_run
from pipar_jax.report.scores import score_text
from pipar_jax.report.svg import Series, aligned, digits, legend, line_chart
from pipar_jax.schedule.plan import COORDINATOR, device_name

#: A cell of a table: a text, or a number that is aligned with those above and below it.
Cell = str | float | None


#: What the sections show, by title.
_ABOUT = {
    "Results":
        "Idle: the share of the rounds in which a host computes nothing. Compilation and "
        "evaluation are not part of a round.",
    "Learning":
        "The curves over epochs compare what the methods learn from the same number of samples; "
        "the curves over seconds of training also show their speed.",
    "Privacy":
        "What is protected from whom, and what is not, with the epsilon of all that has left the "
        "devices; the relation is the replacement of one record, or of one user.",
    "Membership":
        "Rounds in or before which a device was lost, late, dropped, or came back. The difference "
        "is that to the median round in which nothing happened: waiting for a deadline, and steps "
        "that are computed anew; of a round that was undone, all of it. The time between two "
        "rounds is not part of it.",
    "One step":
        "Wide bars are computations, labelled with the letter of the action and the index of the "
        "micro-batch; thin bars below them are messages being sent. Each micro-batch has a "
        "colour: hover over one to follow it. Below the measured step is the one that the "
        "simulator predicts from the run's median times, on the same scale.",
    "Idle time":
        "The time in which a host did not compute, by what it waited for along the critical path.",
    "Links":
        "Bytes on the wire in all rounds, including headers and heartbeats. The queueing time of a "
        "message runs from the call that sends it until its first byte is written: it waits for "
        "earlier messages, for credit from a receiver that lags behind, or for a full socket.",
    "Predicted and measured":
        "The simulator predicts a round from the median times of the run itself. The difference "
        "is due to variation in these times, which the prediction leaves out. If the tuner chose "
        "the plan, the error of its own prediction, made before the run, is given as well.",
}  # fmt: skip


def write_report(folders: Sequence[Path], target: Path, remedy: str = RUN_REMEDY) -> None:
    """Writes the report of one or more runs.

    Args:
      folders: Folders of the runs, at least one.
      target: Path of the HTML file.
      remedy: What the user can do if it cannot be written.

    Raises:
      DiskError: The file cannot be written.
      RunError: A run cannot be read.
    """
    page = make_page([read_run(folder) for folder in folders])
    try:
        write_text(target, page, remedy)
    except DiskError as error:
        raise DiskError(f"the report cannot be written: {error}") from error


def make_page(runs: Sequence[RecordedRun]) -> str:
    """Returns the report as one self-contained HTML document.

    Args:
      runs: The runs, at least one.
    """
    names = _names(runs)
    settings = {str(run.config["model"]["name"]) + " on " + str(run.config["data"]["source"])
                for run in runs}  # fmt: skip
    heading = f"{', '.join(names)}: {', '.join(sorted(settings))}"
    sections = [
        _section("Results", _results(runs, names)),
        _section("Learning", _curves(runs, names)),
        _section("Privacy", privacy_text(runs, names)),
        _section("Membership", _membership(runs, names)),
        _section("One step", _steps(runs, names)),
        _section("Idle time", idle_bars(runs, names)),
        _section("Links", byte_bars(runs, names) + _links(runs, names)),
        _section("Predicted and measured", _predictions(runs, names)),
        _section("Configuration", _configurations(runs, names)),
    ]
    body = "".join(sections)
    folders = [f"{run.parent}/{run.name}" for run in runs]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(heading)}</title><style>{STYLE}</style></head><body><main>"
        f"<h1>{html.escape(heading)}</h1>{_facts(runs, names)}{body}"
        f"<footer>Made by pipar_jax from {html.escape(', '.join(folders))}."
        f"</footer></main><script>{SCRIPT}</script></body></html>\n"
    )


def _section(title: str, content: str) -> str:
    """Returns a section, or nothing if it would be empty."""
    if not content:
        return ""
    about = f"<p>{html.escape(_ABOUT[title])}</p>" if title in _ABOUT else ""
    return f"<section><h2>{html.escape(title)}</h2>{about}{content}</section>"


def _names(runs: Sequence[RecordedRun]) -> list[str]:
    """Returns the label of each run, no two of them alike: the shortest that tells them apart.

    It is the method, the folder, or that with the folder around it; else runs are numbered.
    """
    labels = [
        (run.title, run.name, f"{run.parent}/{run.name}", f"{run.name} ({number})")
        for number, run in enumerate(runs, start=1)
    ]
    counts = [collections.Counter(column) for column in zip(*labels, strict=True)]
    return [
        next(text for text, seen in zip(own, counts, strict=True) if seen[text] == 1)
        for own in labels
    ]


def _facts(runs: Sequence[RecordedRun], names: Sequence[str]) -> str:
    """Returns what the runs' settings have in common, and a line for each that has more."""
    parts = [_parts(run) for run in runs]
    common = [part for part in parts[0] if all(part in own for own in parts)]
    others = (", ".join(part for part in own if part not in common) for own in parts)
    lines = [", ".join(common)]
    lines += [f"{name}: {text}" for name, text in zip(names, others, strict=True) if text]
    return "".join(f"<p>{html.escape(line)}.</p>" for line in lines if line)


def _parts(run: RecordedRun) -> list[str]:
    """Returns facts about the setting of a run, each a few words."""
    started, config = run.last("run_started"), run.config
    devices = sorted({row["device"] for row in run.of("device_joined")})
    devices = devices or list(range(config["devices"]["count"]))
    places = started.get("devices", len(devices))
    sampled = places < len(devices)
    parts = [f"{len(devices)} devices" + (f", {places} of them in a round" if sampled else "")]
    links = {run.setting(device_name(index), "link"): None for index in devices}
    if [*links] != ["none"]:
        parts.append(f"links {shorten([*links])}")
    slowdowns = {float(run.setting(device_name(index), "slowdown") or 1.0) for index in devices}
    if slowdowns != {1.0}:
        factors = shorten([f"{factor:g}" for factor in sorted(slowdowns)])
        parts.append(f"devices slowed down by a factor of {factors}")
    if started:
        parts.append(f"{started['parameters']:,} parameters")
    if samples := run.samples_per_epoch():
        parts.append(f"{samples:,} samples {'on all devices' if sampled else 'per epoch'}")
    parts.append(f"batch {config['data']['batch_size']}")
    return parts


def _table(head: Iterable[str], rows: Sequence[tuple[str, Sequence[Cell]]], words: int = 1) -> str:
    """Returns a table.

    Args:
      head: The heads of the columns.
      rows: For each row a class of the style sheet, or an empty text, and the cells.
      words: Number of columns with texts, which are left-aligned; the others hold figures.
    """

    def cells(tag: str, values: Iterable[str]) -> str:
        return "".join(
            f"<{tag}{' class=words' if i < words else ''}>{html.escape(value)}</{tag}>"
            for i, value in enumerate(values)
        )

    columns = [_column(column) for column in zip(*(values for _, values in rows), strict=True)]
    body = "".join(
        f"<tr{f' class={kind}' if kind else ''}>{cells('td', values)}</tr>"
        for (kind, _), values in zip(rows, zip(*columns, strict=True), strict=True)
    )
    return f"<table><thead><tr>{cells('th', head)}</tr></thead><tbody>{body}</tbody></table>"


def _column(cells: Sequence[Cell]) -> list[str]:
    """Returns the texts of a column's cells, its numbers aligned at the decimal point."""
    numbers = iter(aligned([cell for cell in cells if not isinstance(cell, str)]))
    return [cell if isinstance(cell, str) else next(numbers) for cell in cells]


def _results(runs: Sequence[RecordedRun], names: Sequence[str]) -> str:
    """Returns the table of results, one row per run."""
    base = next((run for run in runs if run.title == "FL"), runs[0])
    base_name = names[runs.index(base)]
    finished = [run for run in runs if run.finished and run.epoch_s]
    fastest = min(finished, key=lambda run: run.epoch_s, default=None)
    rows = []
    scores = list(dict.fromkeys(run.task["main"] for run in runs))
    for run, title in zip(runs, names, strict=True):
        summary, score = run.last("run_finished"), run.last("evaluated")
        done = run.of("round_finished")
        idle = [run.idle_share(host) for host in run.devices]
        idle_known = [share for share in idle if share is not None]
        server = run.idle_share(COORDINATOR)
        speed = base.epoch_s / run.epoch_s if run.epoch_s and base.epoch_s else None
        cells: list[Cell] = [
            title if run.finished else f"{title} (did not finish)",
            run.plan_text,
            run.epoch_s or None,
            f"{speed:.2f}×" if speed else "–",
            f"{server:.0%}" if server is not None else "–",
            f"{statistics.fmean(idle_known):.0%}" if idle_known else "–",
            sum(row["bytes_up"] for row in done) / 1e6,
            sum(row["bytes_down"] for row in done) / 1e6,
            *(_score_text(run, name, summary or score) for name in scores),
        ]
        rows.append(("best" if run is fastest and len(runs) > 1 else "", cells))
    head = ("method", "plan", "seconds per epoch", f"speed-up over {base_name}", "server idle",
            "devices idle", "MB up", "MB down", *(f"test {name}" for name in scores))  # fmt: skip
    return _table(head, rows, words=2)


def _score_text(run: RecordedRun, name: str, event: JsonMapping) -> str:
    """Returns a score of an event; a dash if the run does not have it."""
    if not event or (name != "loss" and name not in event.get("metrics", {})):
        return "–"
    return score_text(run.task, name, score_of(event, name))


def _curves(runs: Sequence[RecordedRun], names: Sequence[str]) -> str:
    """Returns the learning curves: main score and loss over epochs and over seconds."""
    charts = []
    kinds = [("Training loss", "round_finished", "loss", 1.0, "")]
    for name in reversed(list(dict.fromkeys(run.task["main"] for run in runs))):
        share = any(run.task["scores"].get(name, {}).get("share") for run in runs)
        kinds.insert(
            0, (f"Test {name}", "evaluated", name, *((100.0, "%") if share else (1.0, "")))
        )
    for title, event, field, factor, unit in kinds:
        for axis in ("epochs", "seconds"):
            series = [
                Series(name, hue, [(_x(run, row, axis), value * factor)
                                   for row in run.of(event)
                                   if (value := score_of(row, field)) is not None])
                for hue, (run, name) in enumerate(zip(runs, names, strict=True))
            ]  # fmt: skip
            charts.append(line_chart(title, axis, [line for line in series if line.points],
                                     unit=unit))  # fmt: skip
    if not any(charts):
        return ""
    named = legend([(f"hue{hue % 8}", name) for hue, name in enumerate(names)])
    return f'{named}<div class="pair">{"".join(charts)}</div>'


def _x(run: RecordedRun, row: JsonMapping, axis: str) -> float:
    """Returns the abscissa of an event: epochs, or seconds of training."""
    return float(row["epoch"] if axis == "epochs" else run.elapsed.get(row["round"], 0.0))


def _membership(runs: Sequence[RecordedRun], names: Sequence[str]) -> str:
    """Returns the table of rounds in which devices came or went, for runs with such rounds."""
    parts = []
    head = ("round", "devices that count", "out", "came", "seconds", "more than undisturbed")
    for run, name in zip(runs, names, strict=True):
        if rows := membership_rows(run):
            text = html.escape(f"{name}: {membership_text(run)}")
            table = _table(head, [("", row) for row in rows], words=4)
            parts.append(f"<p>{text}</p>{table}")
    return "".join(parts)


def _steps(runs: Sequence[RecordedRun], names: Sequence[str]) -> str:
    """Returns the Gantt charts of all runs under one legend."""
    charts = "".join(map(gantt_charts, runs, names))
    return actions_legend(runs) + charts if charts else ""


def _predictions(runs: Sequence[RecordedRun], names: Sequence[str]) -> str:
    """Returns the table of predicted and measured rounds."""
    rows: list[tuple[str, Sequence[Cell]]] = []
    for run, name in zip(runs, names, strict=True):
        schedule = run.schedule()
        try:
            prediction = run.predict()
        except PlanError as error:
            rows.append(("", [name, f"cannot be predicted: {error}", *[""] * 6]))
            continue
        done = [row for row in run.of("round_finished") if row["committed"]]
        if prediction is None or schedule is None or not done:
            continue
        measured = statistics.median(row["seconds"] for row in done)
        error_share = prediction.seconds / measured - 1.0
        loads = dict(prediction.busy_s)
        for ends, nbytes in prediction.carried_bytes.items():
            loads[f"{ends[0]} → {ends[1]}"] = run.link_of(ends).occupied_s(nbytes)
        bottleneck = max(loads, key=lambda key: loads[key])
        server = run.idle_share(COORDINATOR)
        tuned = run.last("tuned").get("epoch_s")  # before the run, from the profile
        rows.append(
            ("", [
                name, f"{bottleneck}, busy {loads[bottleneck] / prediction.seconds:.0%}",
                measured, prediction.seconds, f"{error_share:+.1%}",
                f"{tuned / run.epoch_s - 1:+.1%}" if tuned and run.epoch_s else "–",
                f"{server:.0%}" if server is not None else "–",
                f"{prediction.idle_share(COORDINATOR):.0%}",
            ])
        )  # fmt: skip
    if not rows:
        return ""
    head = ("method", "bottleneck", "seconds per round", "predicted", "difference",
            "tuner's error", "server idle", "predicted")  # fmt: skip
    return _table(head, rows, words=2)


def _links(runs: Sequence[RecordedRun], names: Sequence[str]) -> str:
    """Returns the table of traffic and waiting times, one row per direction of a link."""
    rows: list[tuple[str, Sequence[Cell]]] = []
    for run, name in zip(runs, names, strict=True):
        shown = links_of(run)
        for ends in shown:
            sums = run.traffic[ends]
            raw, messages, reconnects = sums["raw_bytes"], sums["messages"], sums["reconnects"]
            cells: list[Cell] = [
                f"{name} {ends[0]} → {ends[1]}",
                sums["bytes"] / 1e6,
                f"{sums['payload_bytes'] / raw:.0%}" if raw else "–",
                f"{messages:,.0f}",
                sums["queue_s"] / messages * 1e3 if messages else None,
                sums["queued_peak_bytes"] / 1e3,
                f"{sums['credit_wait_s']:.2f}",
                f"{sums['blocked_s']:.2f}",
                sums["rtt_s"] * 1e3 if "rtt_s" in sums else None,
                sums.get("rate_mbps"),
                f"{reconnects:.0f} ({digits(sums['repeated_bytes'] / 1e3)} kB)"
                if reconnects
                else "–",
            ]
            rows.append(("", cells))
        if left := len(run.traffic) - len(shown):
            rows.append(("", [f"{name}: {left} more in metrics.jsonl", *[""] * 10]))
    if not rows:
        return ""
    head = ("link", "MB", "size after codec", "messages", "mean queueing, ms", "peak queue, kB",
            "no credit, s", "socket full, s", "round trip, ms", "measured Mbit/s",
            "reconnects (resent)")  # fmt: skip
    return _table(head, rows)


def _configurations(runs: Sequence[RecordedRun], names: Sequence[str]) -> str:
    """Returns the configurations side by side; fields that differ come first and are marked."""
    flat = [_flatten(run.config) for run in runs]
    fields = list(dict.fromkeys(field for config in flat for field in config))
    rows: list[tuple[str, Sequence[str]]] = []
    for field in fields:
        values = [config.get(field, "–") for config in flat]
        differs = len(set(values)) > 1
        shown = values if differs or len(runs) == 1 else [values[0], *[""] * (len(runs) - 1)]
        rows.append(("differs" if differs else "", [field, *shown]))
    rows.sort(key=lambda row: row[0] == "")
    table = _table(["field", *names], rows, words=1 + len(runs))
    return f"<details><summary>{len(rows)} fields</summary>{table}</details>"


def _flatten(config: JsonMapping, prefix: str = "") -> dict[str, str]:
    """Returns all fields as texts, keyed by their dotted names; secrets are hidden."""
    fields: dict[str, str] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            fields.update(_flatten(value, f"{prefix}{key}."))
        elif key == "token":
            fields[f"{prefix}{key}"] = "–" if value is None else "(hidden)"
        else:
            fields[f"{prefix}{key}"] = str(value)
    return fields
