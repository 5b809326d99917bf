"""A host whose file of base weights is not the server's is refused, by unit and in one line."""

from __future__ import annotations

import dataclasses
import queue
import shutil
import threading

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from pipar_jax.errors import ConfigError, PiparError, RunError
from pipar_jax.launch.api import run_here
from pipar_jax.launch.finished_run import load
from pipar_jax.methods.registry import METHODS, hosts_of, plan_for
from pipar_jax.methods.resolution import resolve
from pipar_jax.roles.participants import run_device, run_node
from pipar_jax.roles.server import run_server
from pipar_jax.runtime.setup import build_model
from pipar_jax.schedule.plan import host_index, is_node, long_name
from pipar_jax.training.base_weights import digest
from stages.signature import ArrayType, Signature
from tests.pipar_jax.runtime import support, test_lora
from tests.stages import test_gpt2

base = test_lora.base  # the fixture: a file of Hugging Face beside the devices' samples
#: A weight of each unit as the file names it.
OF = {"embed": "wte.weight", "block1": "h.0.ln_1.weight", "block2": "h.1.ln_1.weight",
      "head": "ln_f.weight"}  # fmt: skip
UNITS = tuple(OF)
TOKENS = ArrayType((test_gpt2.LENGTH,), "int32")
SIGNATURE = Signature(TOKENS, {}, {"y": TOKENS}, test_gpt2.VOCABULARY)


def setting(folder, method, base):
    made = test_lora.setting(folder, "mpsl" if METHODS[method].uses_nodes else "fl", base)
    made.method, made.pipeline.cut = method, 1
    made.epochs, made.aggregation.every = 1, "epoch"
    if METHODS[method].one_device:
        made.devices.count, made.pipeline.cuts = 1, "2"
    if METHODS[method].order == "sequential":
        made.pipeline.micro_batches = 1
    return resolve(made)


def changed(base, unit, path):
    """Returns a file in which a weight of one unit differs by little."""
    arrays = load_file(base)
    arrays[f"transformer.{OF[unit]}"].reshape(-1)[-1] += np.float32(1e-3)
    save_file(arrays, path)
    return path


def run(config, other, path, script=()):
    """Runs all hosts as threads, one of them with a file of its own; returns their errors."""
    errors: dict[str, BaseException] = {}
    address: queue.SimpleQueue = queue.SimpleQueue()

    def take_part(name, function, config, *args, **values):
        try:
            if name == other:
                config = dataclasses.replace(
                    config, model=dataclasses.replace(config.model, base=str(path))
                )
            function(config, *args, **values)
        except PiparError as error:
            errors[name] = error

    def tell(event):
        if event["event"] == "listening":
            address.put((event["host"], event["port"]))

    server = threading.Thread(
        target=take_part,
        args=("server", run_server, config),
        kwargs={"on_event": tell, "script": script},
    )
    threads = [server]
    server.start()
    where = address.get(timeout=120)
    for name in (*hosts_of(config).nodes, *hosts_of(config).devices):
        function = run_node if is_node(name) else run_device
        args = (name, function, config, host_index(name), where)
        threads.append(threading.Thread(target=take_part, args=args))
        threads[-1].start()
    for thread in threads:
        thread.join(300)
        assert not thread.is_alive()
    return errors


@pytest.mark.sampled(2)
@pytest.mark.parametrize("method", METHODS)
def test_each_unit_that_a_host_holds_has_to_be_the_servers(method, base, tmp_path):
    """For one host of each kind: refused for a unit that it holds, whatever other units are."""
    config = setting(tmp_path, method, base)
    plan = plan_for(config, UNITS)
    nodes, devices = hosts_of(config).nodes, hosts_of(config).devices
    other = (nodes or devices)[-1]
    held = {UNITS[unit] for unit in plan.held_units(other, len(UNITS))}
    path = changed(base, sorted(held)[-1], tmp_path / "other.safetensors")
    errors = run(config, other, path)
    line = str(errors[other])
    assert line == (
        f"{long_name(other)} begins with other weights of unit {sorted(held)[-1]!r} than the "
        f"server: model.base={str(path)!r} must be a copy of the server's file"
    )
    assert isinstance(errors[other], RunError) and line in str(errors["server"])


def test_units_that_a_host_does_not_hold_may_differ(base, tmp_path):
    config = setting(tmp_path, "sfl", base)
    assert not run(config, "d1", changed(base, "head", tmp_path / "other.safetensors"))


def test_a_plan_that_needs_other_units_of_a_host_is_refused(base, tmp_path):
    """Between two rounds: the unit that would move to the device differs there."""
    config = setting(tmp_path, "sfl", base)
    config.epochs = 2
    now = plan_for(config, UNITS)
    config.pipeline.cut = 2
    script = [now, plan_for(config, UNITS)]
    config.pipeline.cut = 1
    path = changed(base, "block1", tmp_path / "other.safetensors")
    errors = run(config, "d1", path, script)
    line = "device 1 begins with other weights of unit 'block1' than the server: "
    assert str(errors["server"]).startswith(line)


def test_a_host_that_was_given_no_file_is_refused(base, tmp_path):
    config = setting(tmp_path, "sfl", base)
    with pytest.raises(RunError, match="device 1 begins with other weights of unit 'embed' than"):
        raise run(config, "d1", "")["d1"]


def test_the_layout_of_the_file_does_not_count(base, tmp_path):
    """The same weights in this project's layout have the same digests."""
    config = setting(tmp_path, "fl", base)
    theirs = build_model(config, SIGNATURE)
    arrays = {
        f"{unit}/{path}": np.asarray(array)
        for unit, some in theirs.completed(theirs.init(0)[0]).items()
        for path, array in some.items()
        if "/lora/" not in path
    }
    save_file(arrays, tmp_path / "ours.safetensors")
    config.model.base = str(tmp_path / "ours.safetensors")
    ours = build_model(config, SIGNATURE)
    digests = [digest(ours, unit) for unit in ours.units]
    assert digests == [digest(theirs, unit) for unit in theirs.units]
    assert all(digests) and len(set(digests)) == len(digests)
    plain = support.model("mlp", "float32")
    assert [digest(plain, unit) for unit in plain.units] == [""] * len(plain.units)


@pytest.mark.sampled(3, 1)
@pytest.mark.parametrize("then", ["none", "another", "a copy"])
def test_a_run_goes_on_with_the_file_that_it_began_with(then, base, tmp_path):
    """All hosts agree on whatever is given, so that nobody but the checkpoint would notice."""
    config = setting(tmp_path, "fl", base)
    config.checkpoint.every_rounds = 1
    before = load(run_here(config, on_event=lambda event: None))
    config.epochs, config.run.resume = 2, "auto"
    path = changed(base, "head", tmp_path / "other.safetensors")
    if then == "a copy":
        shutil.copy(base, path)
    config.model.base = "" if then == "none" else str(path)
    if then == "a copy":
        after = load(run_here(config, on_event=lambda event: None))
        for unit, arrays in before.params.items():
            for name, array in arrays.items():
                same = np.array_equal(after.params[unit][name], array)
                assert same != ("/lora/" in name), (unit, name)
        return
    unit = "head" if then == "another" else "embed"
    says = rf"^model\.base='.*' does not continue .*checkpoints/1: its weights of unit '{unit}' "
    with pytest.raises(ConfigError, match=says):
        run_here(config, on_event=lambda event: None)


def test_a_run_that_began_without_a_file_goes_on_without_one(base, tmp_path):
    config = setting(tmp_path, "fl", base)
    config.checkpoint.every_rounds, config.model.base = 1, ""
    run_here(config, on_event=lambda event: None)
    config.epochs, config.run.resume, config.model.base = 2, "auto", str(base)
    with pytest.raises(ConfigError, match=r"not those that the run began with.*\(none, if it"):
        run_here(config, on_event=lambda event: None)
