"""Private runs: what leaves devices is clipped, noised and in the ledger first, for all methods."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest

from pipar_jax.methods.registry import METHODS
from pipar_jax.privacy.accountant import gaussian_epsilon, noise_for, release_cost
from pipar_jax.privacy.ledger import LEDGER
from tests.pipar_jax.runtime import support

SAMPLES = (17, 33)


@pytest.fixture(autouse=True, scope="module")
def x64():
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


def setting(folder, method, **privacy):
    """A run of a method, private with a noise that changes nothing and clips never reached."""
    samples = SAMPLES[:1] if METHODS[method].one_device else SAMPLES
    made = support.config(folder, samples, method=method)
    made.pipeline.cut, made.pipeline.micro_batches = 2, 3
    if METHODS[method].uses_nodes:
        made.nodes.count, made.pipeline.cuts = 1, "1,3" if method == "mpsl" else "2"
    values = {"noise": 1e-12, "update_clip": 1e3, **privacy}
    if METHODS[method].cuts:
        values.setdefault("activation_clip", 1e3)
    for name, value in values.items():
        setattr(made.privacy, name, value)
    return made, samples


def plain(made):
    """The same run without privacy."""
    for name, value in vars(type(made.privacy)()).items():
        setattr(made.privacy, name, value)
    return made


def weights(run):
    return {
        f"{unit}/{path}": array for unit, some in run.params.items() for path, array in some.items()
    }


def methods(*some):
    """All methods, of which `make test` runs some."""
    return [pytest.param(one, marks=[pytest.mark.soak] * (one not in some)) for one in METHODS]


@pytest.mark.parametrize("method", methods("fl", "sl", "pipar", "mpsl"))
def test_without_noise_to_speak_of_a_private_run_is_the_plain_one(method, tmp_path):
    network = support.model()
    made, samples = setting(tmp_path / "private", method)
    private = weights(support.trained(made, samples, network))
    other, _ = setting(tmp_path / "plain", method)
    for name, array in weights(support.trained(plain(other), samples, network)).items():
        np.testing.assert_allclose(private[name], array, rtol=1e-6, atol=1e-8, err_msg=name)


@pytest.mark.parametrize("method", methods("fl", "pipar"))
def test_every_mini_batch_is_in_the_ledger_once(method, tmp_path):
    made, samples = setting(tmp_path, method, noise=2.0)
    made.epochs = 2
    run = support.trained(made, samples, support.model())
    for index, count in enumerate(samples):
        path = run.folder / "hosts" / f"d{index}" / LEDGER
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        steps = -(-count // made.data.batch_size)
        taken = max(-(-n // made.data.batch_size) for n in samples) * 2
        if METHODS[method].order == "sequential":
            taken = steps * 2
        assert len(lines) == taken
        kinds = ["activations", "gradients"] if METHODS[method].cuts else ["gradients"]
        assert all(line["what"] == kinds for line in lines)
        assert all(line["cost"] == len(kinds) * release_cost(2.0) for line in lines)
        assert len({(line["group"], line["step"]) for line in lines}) == taken
    finished = [e for e in run.metrics if e["event"] == "round_finished"][-1]
    assert finished["epsilon"] == {
        f"d{i}": pytest.approx(epsilon(run, i)) for i in range(len(samples))
    }
    assert finished["delta"] == made.privacy.delta


def epsilon(run, index):
    """What a device's ledger comes to, counted anew."""
    path = run.folder / "hosts" / f"d{index}" / LEDGER
    most = {}
    for line in map(json.loads, path.read_text().splitlines()):
        most[line["group"]] = max(most.get(line["group"], 0), line["cost"])
    return gaussian_epsilon(sum(most.values()), 1e-5)


USERS = {"unit": "user", "update_clip": 0.5}


def of_users(folder, **privacy):
    made, samples = setting(folder, "fl", **{**USERS, **privacy})
    made.aggregation.weighted = False
    made.aggregation.every, made.epochs = "epoch", 2
    return made, samples


@pytest.mark.parametrize("noise_at", ["device", "server"])
def test_updates_of_users_are_clipped_and_averaged_with_public_weights(noise_at, tmp_path):
    network = support.model()
    made, samples = of_users(tmp_path / "far", noise_at=noise_at, update_clip=1e3)
    far = weights(support.trained(made, samples, network))
    other, _ = of_users(tmp_path / "plain", noise_at=noise_at)
    for name, array in weights(support.trained(plain(other), samples, network)).items():
        np.testing.assert_allclose(far[name], array, rtol=1e-6, atol=1e-8, err_msg=name)
    made, _ = of_users(tmp_path / "near", noise_at=noise_at, update_clip=1e-3)
    run = support.trained(made, samples, network)
    start = network.init(made.seed)[0]
    near = weights(run)
    moved = sum(
        float(np.sum(np.square(near[f"{unit}/{path}"] - np.asarray(array))))
        for unit, some in start.items() for path, array in some.items()
    ) ** 0.5  # fmt: skip
    assert 0 < moved <= 2 * 1e-3
    assert set(run.metrics[-1]) and set(epsilons(run)) == {"d0", "d1"}


def epsilons(run):
    return [e for e in run.metrics if e["event"] == "round_finished"][-1]["epsilon"]


def test_the_noise_of_users_is_calibrated_and_found_in_the_weights(tmp_path):
    network = support.model()
    changed = {}
    for noise_at in ("device", "server"):
        made, samples = of_users(tmp_path / noise_at, noise_at=noise_at, noise=None, epsilon=4.0)
        made.optimizer.learning_rate = 1e-12  # nothing is learned: what changes is noise
        run = support.trained(made, samples, network)
        assert epsilons(run) == {name: pytest.approx(4.0, rel=1e-6) for name in ("d0", "d1")}
        start, found = network.init(made.seed)[0], weights(run)
        changed[noise_at] = np.concatenate(
            [(found[f"{unit}/{path}"] - np.asarray(array)).ravel()
             for unit, some in start.items() for path, array in some.items()]
        )  # fmt: skip
    # Two rounds, two devices: each adds its own, or the server once for both, to the sum.
    deviation = noise_for(4.0, 1e-5, 2) * 0.5 / 2
    for noise_at, adds in (("device", 4), ("server", 2)):
        assert np.std(changed[noise_at]) == pytest.approx(deviation * adds**0.5, rel=0.03)
