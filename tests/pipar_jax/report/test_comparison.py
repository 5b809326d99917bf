"""Comparing methods: what is held equal, and that the table says what the runs came to."""

from __future__ import annotations

import dataclasses
import importlib
import io
from typing import Any

import pytest
from rich.console import Console

from pipar_jax.config import Config
from pipar_jax.errors import ConfigError
from pipar_jax.methods.registry import METHODS, server_methods
from pipar_jax.methods.resolution import resolve
from pipar_jax.report.comparison import (
    Outcome,
    baseline,
    choose_methods,
    conclude,
    make_table,
    parse_methods,
    run_method,
)
from stages import make_task
from tests.sources import ROOT

PRESETS = sorted(path.stem for path in (ROOT / "configs").glob("[a-z]*.py"))
PLAN = "2 of device|1|server x1; shared weights; fcfs; sequential, handed on each epoch"


def _outcome(method: str, epoch_s: float, accuracy: float = 0.975) -> Outcome:
    return Outcome(
        method=method,
        plan="device|1|server x4",
        epoch_s=epoch_s,
        task=make_task().facts(),
        score=accuracy,
        server_idle=0.9,
        device_idle=0.25,
        up_bytes=12_340_000,
        down_bytes=5_000_000,
        folder=f"runs/{method}",
    )


def test_only_method_and_name_differ_between_the_runs() -> None:
    seen: list[Config] = []
    events: list[dict[str, Any]] = []

    def launch(config: Config, *, on_event: Any) -> dict[str, Any]:
        seen.append(config)
        on_event({"event": "run_started", "plan": PLAN})
        return {
            "epoch_seconds": 1.5,
            "loss": 0.1,
            "metrics": {"accuracy": 0.98},
            "task": make_task().facts(),
            "idle": {"server": 0.8, "n1": 0.9, "d0": 0.1, "d1": 0.3},
            "bytes_up": 10,
            "bytes_down": 20,
            "folder": "runs/x",
        }

    config = Config(name="demo", method="pipar", seed=3, epochs=7)
    outcome = run_method(config, "fl", launch, events.append)
    assert [event["event"] for event in events] == ["run_started"]
    (setting,) = seen
    assert (setting.method, setting.name, setting.seed, setting.epochs) == ("fl", "demo-fl", 3, 7)
    assert setting.data == config.data and setting.model == config.model
    assert (config.method, config.name) == ("pipar", "demo")
    assert outcome.plan == "device|1|server x1, in turn"
    assert outcome.server_idle == 0.8
    assert outcome.device_idle == pytest.approx(0.2)
    assert (outcome.up_bytes, outcome.down_bytes) == (10, 20)


def test_the_table_has_every_figure_and_fits_100_columns() -> None:
    outcomes = [_outcome("sfl", 2.0), _outcome("fl", 3.0), _outcome("pipar", 1.0, 0.981)]
    console = Console(file=io.StringIO(), width=100)
    console.print(make_table(outcomes))
    text = console.file.getvalue()
    rows = {line.split()[0]: line for line in text.splitlines() if line.strip()}
    assert "1.50x" in rows["SFL"] and "1.00x" in rows["FL"] and "3.00x" in rows["PiPar"]
    for piece in ("device|1|server x4", "1.00", "90%", "25%", "12.34", "5.00", "98.1%"):
        assert piece in rows["PiPar"], rows["PiPar"]


def test_speed_ups_are_over_fl_or_else_the_first() -> None:
    assert baseline([_outcome("sl", 1.0), _outcome("fl", 2.0)]).method == "fl"
    assert baseline([_outcome("sl", 1.0), _outcome("sfl", 2.0)]).method == "sl"


@pytest.mark.parametrize(
    ("outcomes", "sentence"),
    [
        (
            [_outcome("fl", 3.0), _outcome("pipar", 1.0)],
            "PiPar is the fastest here, 3.0 times as fast as FL; all reach the same test "
            "accuracy, 97.5%.",
        ),
        (
            [_outcome("fl", 1.0, 0.95), _outcome("pipar", 1.5, 0.96)],
            "FL is the fastest here; test accuracy lies between 95.0% and 96.0%.",
        ),
    ],
)
def test_the_conclusion_follows_from_the_figures(outcomes: list[Outcome], sentence: str) -> None:
    assert conclude(outcomes) == sentence


def test_methods_are_read_once_each_in_the_order_given() -> None:
    assert parse_methods(" pipar,fl, pipar ") == ["pipar", "fl"]


@pytest.mark.parametrize("preset", PRESETS)
def test_by_default_every_preset_is_compared_by_the_methods_that_fit_it(preset: str) -> None:
    config = importlib.import_module(f"configs.{preset}").get_config()
    methods = choose_methods(config, "")
    assert methods[:4] == list(server_methods())
    assert (config.method in methods) == (config.method in METHODS)  # auto chooses one of them
    for method in METHODS:
        assert choose_methods(config, method) == [method]
    for method in methods:
        resolve(dataclasses.replace(config, method=method))


def test_methods_that_do_not_fit_are_left_out_only_if_nobody_asked_for_them() -> None:
    config = Config(method="pipar")
    config.tuner.adapt = True  # not possible with weights that are handed on
    fitting = choose_methods(config, "")
    assert "pipar" in fitting and "sl" not in fitting
    assert choose_methods(config, "sl") == ["sl"]
    config.data.batch_size = 0
    with pytest.raises(ConfigError, match="--methods="):
        choose_methods(config, "")


@pytest.mark.parametrize(
    ("text", "message"), [("fl,pippar", "did you mean 'pipar'"), (" ,", "names no method")]
)
def test_a_wrong_method_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_methods(text)
