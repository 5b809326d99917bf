"""A checkpoint is exported with what is frozen, as the run is, or with a word of what is not."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from flax import serialization
from safetensors.numpy import load_file, save_file

from pipar_jax.config.checkpoints import CHECKPOINTS, FACTS, WEIGHTS
from pipar_jax.launch.api import run_here
from pipar_jax.launch.finished_run import load
from pipar_jax.methods.resolution import resolve
from pipar_jax.roles.whole_weights import whole_weights
from pipar_jax.training.checkpoint import read_tensors
from tests.experiments.test_export import export
from tests.pipar_jax.runtime import support, test_lora

base = test_lora.base  # the fixture: a file of Hugging Face beside the devices' samples


@pytest.fixture(scope="module")
def adapted(base, tmp_path_factory):
    """A run of adapters with a checkpoint, and its file of base weights."""
    folder = tmp_path_factory.mktemp("adapted")
    own = folder / "base.safetensors"
    shutil.copy(base, own)
    made = test_lora.setting(folder, "fl", base)
    made.model.base, made.epochs, made.aggregation.every = str(own), 1, "epoch"
    made.checkpoint.every_rounds = 1
    return load(run_here(resolve(made), on_event=lambda event: None)), own


def test_a_checkpoint_has_the_frozen_weights_of_its_base(adapted):
    run, _ = adapted
    found = whole_weights(run.folder / CHECKPOINTS / "1")
    assert (found.personal, found.lacking) == ((), "")
    wanted = read_tensors(run.folder / WEIGHTS)
    assert found.tensors.keys() == wanted.keys()
    for name, array in wanted.items():
        np.testing.assert_array_equal(found.tensors[name], array, err_msg=name)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("then", ["changed", "gone", "of a version before"])
def test_frozen_weights_that_are_not_known_are_named(adapted, tmp_path, then):
    run, own = adapted
    shutil.copytree(run.folder, tmp_path / "run")
    content, says = own.read_bytes(), "are not those that the run began with"
    try:
        if then == "changed":
            arrays = load_file(own)
            arrays["transformer.ln_f.weight"][-1] += np.float32(1e-3)
            save_file(arrays, own)
        elif then == "gone":
            own.unlink()
            says = "cannot be read"
        else:
            path = tmp_path / "run" / CHECKPOINTS / "1" / FACTS / "metadata"
            facts = json.loads(path.read_text(encoding="utf-8"))
            del facts["signature"], facts["frozen"]
            path.write_text(json.dumps(facts), encoding="utf-8")
            says = "is of a version that did not keep the shapes of samples"
        found = whole_weights(tmp_path / "run" / CHECKPOINTS / "1")
        done = export(tmp_path, str(tmp_path / "run" / CHECKPOINTS / "1"))
    finally:
        own.write_bytes(content)
    units = "all units" if then == "of a version before" else "embed, block1, block2, head"
    assert found.lacking.startswith(f"the frozen weights of {units}: ") and says in found.lacking
    assert all("/lora/" in name for name in found.tensors)
    wrote, missing = done.stdout.splitlines()
    assert wrote.endswith("to run-1.msgpack") and missing == f"without {found.lacking}"
    tree = serialization.msgpack_restore((tmp_path / "run-1.msgpack").read_bytes())
    assert set(tree) <= {"embed", "block1", "block2", "head"}


def test_personal_weights_of_a_run_that_is_not_over_are_named(tmp_path):
    """Its checkpoint says so, since the file of its weights is not there yet."""
    made = support.config(tmp_path, (14, 14), method="fl", dtype="float32")
    made.checkpoint.every_rounds, made.aggregation.every = 1, "epoch"
    run = support.trained(made, (14, 14))
    (run.folder / WEIGHTS).unlink()
    path = run.folder / CHECKPOINTS / "1" / FACTS / "metadata"
    facts = json.loads(path.read_text(encoding="utf-8"))
    facts["model"][run.model.unit_names[-1]]["own"] = "float32[1]"
    path.write_text(json.dumps(facts), encoding="utf-8")
    for where in (run.folder, run.folder / CHECKPOINTS / "1"):
        found = whole_weights(where)
        assert found.personal == (f"{run.model.unit_names[-1]}/own",) and found.lacking == ""
