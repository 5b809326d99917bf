"""The public way to run one host of a run, and functions instead of objects in ``train``."""

from __future__ import annotations

import copy
import os
import pathlib
import queue
import subprocess
import sys
import textwrap
import threading

import numpy as np
import pytest

import pipar_jax
from configs import digits
from pipar_jax.config import plugins
from pipar_jax.config.checkpoints import CHECKPOINTS, FACTS
from pipar_jax.disk.files import write_tensors
from pipar_jax.errors import ConfigError, JoinError, PiparError
from pipar_jax.launch import take_part
from tests.patience import PROCESS_S
from tests.sources import ROOT

MODULE = """
import numpy as np
from flax import nnx

class Net(nnx.Module):
    def __init__(self, width, rngs):
        self.one = nnx.Linear(64, width, rngs=rngs)
        self.two = nnx.Linear(width, 10, rngs=rngs)

    def __call__(self, x):
        return self.two(nnx.relu(self.one(x.reshape(x.shape[0], -1))))

def net(width=5):
    return lambda rngs: Net(width, rngs)

def load(device):
    rng = np.random.default_rng(0 if device is None else device + 1)
    x, y = rng.normal(size=(20, 8, 8, 1)).astype(np.float32), rng.integers(0, 10, 20)
    part = "test" if device is None else "train"
    return {f"x_{part}": x, f"y_{part}": y, "classes": 10}
"""

SCRIPT = """
import os, sys
sys.path.append(sys.argv[1])  # known to this process alone
import brought_net, pipar_jax
from configs import digits

if __name__ == "__main__":
    config = digits.get_config()
    config.run.dir, config.epochs, config.model.args = sys.argv[2], 1, "width=7"
    run = pipar_jax.train(config, brought_net.net, brought_net.load)
    print(run.params["one"]["kernel"].shape, len(list((run.folder / "logs").glob("*.log"))))
"""


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host sets jax's variables in its process, which here is that of all tests."""
    monkeypatch.setattr(os, "environ", dict(os.environ))


def small(folder: pathlib.Path) -> pipar_jax.Config:
    config = digits.get_config()
    config.run.dir, config.epochs = str(folder), 1
    config.data.train_samples, config.data.test_samples = 200, 50
    return config


def test_hosts_are_run_one_by_one(tmp_path: pathlib.Path) -> None:
    """As on three machines: each has its own call, and the server's address is all they share."""
    config, listening = small(tmp_path), queue.SimpleQueue[str]()
    errors: list[BaseException] = []

    def take_part(index: int, server: str) -> None:
        try:
            pipar_jax.run_device(small(tmp_path), index, server)
        except PiparError as error:
            errors.append(error)

    def on_event(event: dict) -> None:
        if event["event"] == "listening":
            listening.put(f"{event['host']}:{event['port']}")

    def wait() -> None:
        server = listening.get(timeout=PROCESS_S)
        devices = [threading.Thread(target=take_part, args=(i, server)) for i in range(2)]
        for device in devices:
            device.start()
        for device in devices:
            device.join()

    waiting = threading.Thread(target=wait)
    waiting.start()
    run = pipar_jax.run_server(config, on_event=on_event)
    waiting.join()
    assert not errors and run.score() >= 0.0
    assert run.folder == tmp_path / config.name
    assert config.run.dir == str(tmp_path)  # the caller's configuration stays as it was


def test_a_host_that_cannot_take_part_is_refused_in_one_line(tmp_path: pathlib.Path) -> None:
    config = small(tmp_path)
    config.network.join_timeout_s = 0.1
    with pytest.raises(ConfigError, match=r"index=2 is not valid: devices.count=2, .* 0 to 1"):
        pipar_jax.run_device(config, 2, "127.0.0.1:1")
    with pytest.raises(ConfigError, match=r"index=1 is not valid: nodes.count=0, .* be none"):
        pipar_jax.run_node(config, 1, "127.0.0.1:1")
    with pytest.raises(
        ConfigError, match=r"^server=.nowhere. is not valid: write server=HOST:PORT$"
    ):
        pipar_jax.run_device(config, 0, "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"^run\.dir=.*Not a directory"):
        pipar_jax.run_server(small(tmp_path / "file" / "below"))
    config.method, config.nodes.count, config.pipeline.cuts = "mpsl", 1, "1,2"
    with pytest.raises(JoinError, match=r"compute node 1 cannot join: .* at 127\.0\.0\.1 port 1 "):
        pipar_jax.run_node(config, 1, "127.0.0.1:1")


def test_a_device_may_be_one_of_those_that_come_later(tmp_path: pathlib.Path) -> None:
    config = small(tmp_path)
    config.devices.more = 1
    for index in range(3):
        take_part.check_device(config, index)
    says = r"index=3 is not valid: devices.count=2 and devices.more=1, .* 0 to 2"
    with pytest.raises(ConfigError, match=says):
        pipar_jax.run_device(config, 3, "127.0.0.1:1")
    with pytest.raises(ConfigError, match=f"^--{says}"):
        take_part.check_device(config, 3, "--index")


def test_functions_that_can_be_imported_are_trained_in_processes(tmp_path: pathlib.Path) -> None:
    own = tmp_path / "own"
    own.mkdir()
    (own / "brought_net.py").write_text(textwrap.dedent(MODULE))
    (tmp_path / "script.py").write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, "script.py", str(own), str(tmp_path / "runs")],
        cwd=tmp_path, capture_output=True, text=True, timeout=PROCESS_S,
        env={"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "PATH": "",
             "XDG_CACHE_HOME": str(tmp_path / "cache")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "(64, 7) 3"


def test_a_function_that_no_process_can_import_is_refused(tmp_path: pathlib.Path) -> None:
    def inner() -> None:
        """Not at the top level."""

    for function in (lambda: None, inner):
        with pytest.raises(ConfigError, match="cannot be imported by the processes of a run"):
            pipar_jax.train(small(tmp_path), function)
        with pytest.raises(ConfigError, match=r"^data=.* cannot be imported by the processes"):
            pipar_jax.train(small(tmp_path), None, function)
    assert plugins.name_of(small, "model") == f"module:{__name__}:small"


def test_the_module_of_a_function_is_looked_for_before_anything_starts(
    tmp_path: pathlib.Path,
) -> None:
    for group, name in (("optimizer", "name"), ("optimizer", "schedule"), ("aggregation", "rule"),
                        ("model", "name"), ("cohort", "select"), ("data", "augment")):  # fmt: skip
        for value, says in (("no_such_module:f", "there is no module"), ("json:f", "has no 'f'")):
            config = small(tmp_path)
            if group == "cohort":
                config.cohort.size = 1
            setattr(getattr(config, group), name, f"module:{value}")
            with pytest.raises(ConfigError, match=rf"{group}.{name}=.*{says}"):
                pipar_jax.train(config)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("group", "name", "value", "says"),
    [
        ("stop", "when", "no_such_module:f", "there is no module 'no_such_module'"),
        ("run", "sinks", "no_such_module:f", "there is no module 'no_such_module'"),
        ("stop", "when", "json:no_such", r"module 'json' .* has no 'no_such'"),
        ("run", "sinks", "json:no_such", r"module 'json' .* has no 'no_such'"),
        ("model", "weights", "no/such", "is not there: name the folder of a run"),
        ("model", "weights", "{empty}", "has no weights to start from: name the folder of a run"),
        ("model", "weights", "{torn}", r"torn.safetensors cannot be read as a file of safetensors"),
        ("model", "base", "{torn}", r"torn.safetensors cannot be read as a file of safetensors"),
        ("run", "resume", "{damaged}", r"no checkpoint of .* can be read: .*1/facts/metadata"),
    ],
)
def test_what_the_server_needs_is_looked_for_before_anything_starts(
    tmp_path: pathlib.Path, group: str, name: str, value: str, says: str
) -> None:
    (empty := tmp_path / "empty").mkdir()
    torn, damaged = tmp_path / "torn.safetensors", tmp_path / "damaged"
    write_tensors(torn, {"a/b": np.zeros(9, np.float32)}, {})
    torn.write_bytes(torn.read_bytes()[:-1])
    for rounds in ("1", "2"):
        facts = damaged / CHECKPOINTS / rounds / FACTS
        facts.mkdir(parents=True)
        (facts.parent / "_CHECKPOINT_METADATA").touch()
        (facts / "metadata").write_text("{")
    config = digits.get_config()
    config.run.dir = str(tmp_path / "runs")
    setattr(getattr(config, group), name, value.format(empty=empty, torn=torn, damaged=damaged))
    for run in (pipar_jax.train, pipar_jax.run_server):
        with pytest.raises(ConfigError, match=rf"{group}.{name}=.*{says}"):
            run(copy.deepcopy(config))
    assert not (tmp_path / "runs").exists()
