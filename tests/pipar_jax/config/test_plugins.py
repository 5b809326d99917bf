"""Functions of the user's: their message, their line and the log's name, whatever they raise."""

from __future__ import annotations

import ast
import errno
import importlib
import pathlib
import ssl
import sys
import textwrap
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from flax import nnx

import stages
from comms.errors import explain
from configs import digits
from pipar_jax import data
from pipar_jax.aggregation import rules
from pipar_jax.config import AggregationConfig, OptimizerConfig, plugins
from pipar_jax.errors import ConfigError, DataError, PiparError, RunError
from pipar_jax.launch.flags import load_preset
from pipar_jax.launch.process import describe_os_error, perform
from pipar_jax.methods.resolution import resolve
from pipar_jax.report.sinks import Sinks
from pipar_jax.roles.selection import Candidate, CohortChooser
from pipar_jax.runtime.setup import build_model
from pipar_jax.training import optimizer
from stages.signature import Signature
from tests import sources

#: What somebody's function may do, by its name in the module below, and what is told of it.
RAISED = {
    "told": "FileNotFoundError: put the CSV into data/raw",
    "numbered": r"FileNotFoundError: \[Errno 2\] No such file or directory: 'gone.csv'",
    "silent": "OSError",
    "key": "KeyError: 'column'",
    "lines": "ValueError: first second",
    "ours": "DataError: mine",
    "ended": "SystemExit: enough",
    "library": "JSONDecodeError: Expecting value",
}

MODULE = """
import json
from pipar_jax.errors import DataError

def told(*_, **__):
    raise FileNotFoundError("put the CSV into data/raw")  # line of told

def numbered(*_, **__):
    open("gone.csv")  # line of numbered

def silent(*_, **__):
    raise OSError  # line of silent

def key(*_, **__):
    {}["column"]  # line of key

def lines(*_, **__):
    raise ValueError("first\\n  second")  # line of lines

def ours(*_, **__):
    raise DataError("mine")  # line of ours

def ended(*_, **__):
    raise SystemExit("enough")  # line of ended

def library(*_, **__):
    json.loads("")  # line of library

class Sink:
    def __init__(self, fails, method):
        self.fails, self.method = fails, method
    def write(self, event):
        if self.method == "write":
            self.fails()
    def close(self):
        if self.method == "close":
            self.fails()

nothing = lambda *_: None
"""


@pytest.fixture
def module(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[pathlib.Path]:
    """The user's module ``users_own``, importable."""
    text = MODULE + "".join(
        f"def {name}_{method}(folder):\n    return Sink({name}, {method!r})\n"
        for name in RAISED
        for method in ("write", "close")
    )
    path = tmp_path / "users_own.py"
    path.write_text(text, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield path
    for name in [name for name in sys.modules if name.startswith("users_own")]:
        del sys.modules[name]


def _data(name: str, folder: pathlib.Path) -> None:
    config = digits.get_config()
    config.data.source = f"module:users_own:{name}"
    data.load_device(resolve(config), 0)


def _select(name: str, folder: pathlib.Path) -> None:
    config = digits.get_config()
    config.cohort.size, config.cohort.select = 1, f"module:users_own:{name}"
    candidates = [Candidate(device, 10, 0) for device in range(2)]
    made = resolve(config)
    CohortChooser(made.cohort, made.devices.count, made.seed).choose(0, 0, candidates)


def _make(name: str, folder: pathlib.Path) -> None:
    Sinks(f"users_own:{name}", folder)


def _write(name: str, folder: pathlib.Path) -> None:
    with Sinks(f"users_own:{name}_write", folder) as sinks:
        sinks.write({"event": "evaluated"})


def _close(name: str, folder: pathlib.Path) -> None:
    with Sinks(f"users_own:{name}_close", folder):
        pass


def _preset(name: str, folder: pathlib.Path) -> None:
    preset = folder / "preset.py"
    preset.write_text(f"from users_own import {name}\ndef get_config():\n    return {name}()\n")
    load_preset(str(preset), folder)


def _factory(name: str, folder: pathlib.Path) -> None:
    stages.Model.from_units("own", [("first", _users(name))], (8,), 3)


def _unit(name: str, folder: pathlib.Path) -> None:
    call = _users(name)

    class Unit(nnx.Module):
        def __call__(self, x: Any) -> Any:
            return call(x)

    stages.Model.from_units("own", [("first", lambda _: Unit())], (8,), 3)


def _network(name: str, folder: pathlib.Path) -> None:
    config = digits.get_config()
    config.model.name = f"module:users_own:{name}"
    build_model(resolve(config), Signature.labelled((8, 8, 1), 10))


def _traced(name: str, folder: pathlib.Path) -> None:
    call = _users(name)
    example, params = np.ones((1, 8), np.float32), {"w": np.ones(3, np.float32)}
    stages.trace(lambda params, x: call(x), example, params=params, name="own")


def _optimizer(name: str, folder: pathlib.Path) -> None:
    optimizer.build(OptimizerConfig(name=f"module:users_own:{name}"), steps=1)


def _schedule(name: str, folder: pathlib.Path) -> None:
    config = OptimizerConfig(schedule=f"module:users_own:{name}")
    optimizer.build(config, steps=1)


def _rule(name: str, folder: pathlib.Path) -> None:
    rules.make_rule(AggregationConfig(rule=f"module:users_own:{name}"))


def _users(name: str) -> Any:
    return getattr(importlib.import_module("users_own"), name)


#: Every place where a function of the user's is called.
PLACES = {
    "data": (_data, DataError, "own data module:users_own:{name} failed: "),
    "selection": (
        _select,
        ConfigError,
        r"the selection module:users_own:{name} of cohort\.select failed: ",
    ),
    "sink made": (_make, ConfigError, r"the sink users_own:{name} of run\.sinks failed: "),
    "sink written": (_write, RunError, r"the sink users_own:{name}_write of run\.sinks failed: "),
    "sink closed": (_close, RunError, r"the sink users_own:{name}_close of run\.sinks failed: "),
    "preset": (_preset, ConfigError, r"--config=\S+preset\.py fails: "),
    "network made": (_network, RunError, "own network module:users_own:{name} failed: "),
    "optimiser": (_optimizer, RunError, "own optimiser module:users_own:{name} failed: "),
    "schedule": (_schedule, RunError, "own schedule module:users_own:{name} failed: "),
    "rule": (_rule, RunError, "own rule module:users_own:{name} failed: "),
    "network traced": (
        _traced,
        stages.StageError,
        r"model 'own': cannot be traced in training with float32\[2, 8\]: ",
    ),
    "unit made": (_factory, stages.StageError, "unit 'first': its factory failed: "),
    "unit called": (_unit, stages.StageError, "model 'own', unit 'first': cannot take .*: "),
}


@pytest.mark.parametrize("place", PLACES)
def test_the_line_names_the_function_its_error_and_its_line(
    place: str, module: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    run, kind, opening = PLACES[place]
    for name, says in RAISED.items():
        if kind is stages.StageError and name == "ended":
            continue  # made in the user's own process, which may end
        with pytest.raises(kind, match=opening.format(name=name) + says) as caught:
            run(name, tmp_path)
        text = module.read_text(encoding="utf-8").splitlines()
        line = next(i for i, one in enumerate(text, 1) if one.endswith(f"# line of {name}"))
        assert str(caught.value).endswith(f"({module}:{line}, in {name})")
        assert "\n" not in str(caught.value)
        assert caught.value.__cause__ is not None
        assert kind is stages.StageError or caught.value.of_user


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            "raise FileNotFoundError('put it there')",
            r"FileNotFoundError: put it there .*broken.py:1",
        ),
        ("def f(:", r"SyntaxError: .*users_own_broken.py:1\)"),
        ("import users_own_missing", r"ModuleNotFoundError: No module named 'users_own_missing' "),
        ("", r"has no function 'f'"),
        ("f = 3", r"has no function 'f'"),
    ],
)
def test_a_module_that_cannot_be_imported_says_why(
    text: str, says: str, module: pathlib.Path
) -> None:
    (module.parent / "users_own_broken.py").write_text(text + "\n")
    with pytest.raises(DataError, match=says):
        plugins.find("users_own_broken:f", "own data module:users_own_broken:f", DataError)


def test_a_module_that_is_not_there_says_where_it_must_be() -> None:
    for path in ("users_gone:f", "users_gone.deeper:f"):
        with pytest.raises(DataError, match="must be in the working directory"):
            plugins.find(path, "own data", DataError)


def test_a_sink_without_its_methods_is_refused_before_the_run(
    module: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    with pytest.raises(
        ConfigError, match=r"an object with write\(event\) and close\(\), got NoneT"
    ):
        Sinks("users_own:nothing", tmp_path)


def test_all_sinks_are_closed_and_the_first_error_counts(
    module: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    with pytest.raises(RunError, match="'column'"):  # the second fails as well
        _close("key_close,users_own:told", tmp_path)
    with (
        pytest.raises(ZeroDivisionError) as caught,
        Sinks("users_own:told_close", tmp_path),
    ):
        raise ZeroDivisionError
    assert "put the CSV into" in caught.value.__notes__[0]


def test_a_process_names_its_log_and_leaves_the_traceback_there(
    module: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told: list[dict[str, Any]] = []
    for log in ("d0.log", ""):
        assert perform(lambda: _data("told", module.parent), told.append, debug=False, log=log) == 1
    assert told[0]["kind"] == "DataError" and "put the CSV into data/raw" in told[0]["error"]
    assert told[0]["error"].endswith("(traceback in d0.log)")
    assert told[1]["error"].endswith("(see the traceback with --debug)")
    printed = capsys.readouterr().err
    assert "# line of told" in printed and printed.count("put the CSV into data/raw\n") == 1


def _raise(error: Exception) -> None:
    raise error


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (FileNotFoundError("put the CSV into data/raw"), "put the CSV into data/raw"),
        (OSError("two\n lines"), "two lines"),
        (OSError(), "OSError"),
        (TimeoutError(), "TimeoutError"),
        (OSError(errno.ENOENT, "No such file or directory", "a.csv"), "No such file or directory"),
        (ssl.SSLError(1, "[SSL: BAD] bad (_ssl.c:1)"), "[SSL: BAD] bad (_ssl.c:1)"),
    ],
)
def test_an_error_of_the_system_keeps_its_text_with_a_number_or_without(
    error: OSError, says: str
) -> None:
    assert explain(error) == says
    assert says in describe_os_error(error)
    told: list[dict[str, Any]] = []
    perform(lambda: _raise(error), told.append, debug=False)
    assert says in told[0]["error"]


def test_nobody_else_reads_the_words_of_a_number() -> None:
    """``strerror`` is None where an error has no number: only ``explain`` may read it."""
    found = []
    for name, path in sources.modules().items():
        tree = ast.parse((sources.ROOT / path).read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and node.attr == "strerror":
                module = isinstance(node.value, ast.Name) and node.value.id == "os"
                if not module and name != "comms.errors":
                    found.append(f"{path}:{node.lineno}")
    assert not found, textwrap.fill(f"use comms.errors.explain in {', '.join(found)}")


def test_errors_of_the_user_s_are_told_apart() -> None:
    assert not PiparError("of ours").of_user


def test_what_the_processes_cannot_import_is_refused_with_a_remedy() -> None:
    class Network:
        pass

    Network.__module__, Network.__qualname__ = "__main__", "Network"
    with pytest.raises(ConfigError, match=r"model=__main__.Network cannot .*as stages.trace\(NET"):
        plugins.name_of(Network, "model")
    with pytest.raises(ConfigError, match=r"pass what it returns$"):
        plugins.name_of(Network, "data")
