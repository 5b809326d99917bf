"""Private runs: what leaves devices is clipped, noised and in the ledger first, for all methods."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest

import stages
from pipar_jax.errors import ConfigError, RunError
from pipar_jax.methods.registry import METHODS
from pipar_jax.methods.resolution import resolve
from pipar_jax.privacy.accountant import gaussian_epsilon, noise_for, release_cost
from pipar_jax.privacy.ledger import LEDGER
from pipar_jax.runtime.releases import Releases
from pipar_jax.schedule.actions import FORWARD, Action
from pipar_jax.schedule.plan import DevicePlan
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


def rounds(run):
    return [event for event in run.metrics if event["event"] == "round_finished"]


def test_a_run_ends_before_it_exceeds_its_budget(tmp_path):
    made, samples = setting(tmp_path, "fl", noise=2.0)
    made.epochs, made.aggregation.every = 4, "epoch"
    made.privacy.epsilon = gaussian_epsilon(2.5 * release_cost(2.0), made.privacy.delta)
    run = support.trained(made, samples, support.model())
    assert [one["round"] for one in rounds(run)] == [0, 1]
    stopped = [event for event in run.metrics if event["event"] == "stopped"]
    assert "round 2 would bring device 0 above privacy.epsilon" in stopped[0]["reason"]
    spent = gaussian_epsilon(2 * release_cost(2.0), made.privacy.delta)
    assert epsilons(run) == {name: pytest.approx(spent) for name in ("d0", "d1")}
    assert (run.folder / "weights.safetensors").is_file()
    assert rounds(run)[-1]["loss"] is None  # the figures of a device's samples stay there


def test_a_device_refuses_the_mini_batch_that_would_exceed_its_budget(tmp_path):
    """Whatever the coordinator says; what it released before a restart counts."""
    made, _ = setting(tmp_path, "pipar", noise=2.0)
    made.privacy.epsilon = gaussian_epsilon(4 * release_cost(2.0), made.privacy.delta)
    model, plan = support.model(), DevicePlan((2,), ("device", "server"))
    taken = 0
    for _ in range(2):  # the process starts anew
        releases = Releases(resolve(made), "d0")
        releases.expect(14)  # two mini-batches
        releases.calibrate(plan, 4)
        stage = stages.split(model, (2,), releases=releases.stages(model, plan))[0]
        for step in (0, 1):
            releases.start_attempt()
            for micro_batch in range(3):
                action = Action(0, FORWARD, 0, step, micro_batch)
                assert releases.draw(stages.make_draw(7), action, stage, 3).noise.shape == (
                    2,
                    3,
                    128,
                )
            taken += 1
        releases.close()
    assert taken == 4
    releases = Releases(resolve(made), "d0")
    releases.expect(14)
    releases.calibrate(plan, 4)
    with pytest.raises(RunError, match=r"d0 has released epsilon .* would exceed that"):
        releases.draw(stages.make_draw(7), Action(0, FORWARD, 0, 0, 0), stage, 3)
    assert releases.spent == pytest.approx(4 * release_cost(2.0))


def test_a_resumed_run_counts_what_was_released_before(tmp_path):
    made, samples = setting(tmp_path, "fl", noise=2.0)
    made.epochs, made.aggregation.every, made.checkpoint.every_rounds = 1, "epoch", 1
    support.trained(made, samples, support.model())
    made.epochs, made.run.resume = 2, "auto"
    run = support.trained(made, samples, support.model())
    spent = gaussian_epsilon(2 * release_cost(2.0), made.privacy.delta)
    assert epsilons(run) == {name: pytest.approx(spent) for name in ("d0", "d1")}


def test_labels_that_are_randomised_are_in_the_ledger_once(tmp_path):
    privacy = {"noise": 2.0, "labels": "randomised", "label_epsilon": 1.5}
    made, samples = setting(tmp_path, "pipar", **privacy)
    made.checkpoint.every_rounds, made.run.resume = 1, "auto"
    made.aggregation.every = "epoch"
    support.trained(made, samples, support.model())
    made.epochs = 2
    run = support.trained(made, samples, support.model())
    path = run.folder / "hosts" / "d0" / LEDGER
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    responses = {line["response"] for line in lines if "response" in line}
    assert len(responses) == 1
    assert epsilons(run)["d0"] == pytest.approx(
        gaussian_epsilon(2 * 2 * release_cost(2.0), 1e-5) + 1.5
    )


def test_cotangents_that_depend_on_labels_are_released_as_well(tmp_path):
    privacy = {"noise": 2.0, "labels": "home", "cotangent_clip": 0.1}
    made, samples = setting(tmp_path, "mpsl", **privacy)
    run = support.trained(made, samples, support.model())
    path = run.folder / "hosts" / "d0" / LEDGER
    kinds = {tuple(json.loads(line)["what"]) for line in path.read_text().splitlines()}
    assert kinds == {("activations", "gradients", "cotangents")}
    (promise,) = [event for event in run.metrics if event["event"] == "private"]
    assert not any("NOT" in word for word in promise["words"])


def test_noise_is_new_in_every_run_unless_the_run_is_called_not_private(tmp_path):
    found = {}
    for name, reproducible in (("a", True), ("b", True), ("c", False), ("d", False)):
        made, samples = setting(tmp_path / name, "pipar", noise=1.0, reproducible=reproducible)
        run = support.trained(made, samples, support.model())
        found[name] = np.concatenate([array.ravel() for array in weights(run).values()])
        (promise,) = [event for event in run.metrics if event["event"] == "private"]
        assert any("NOT PRIVATE" in word for word in promise["words"]) == reproducible
    np.testing.assert_array_equal(found["a"], found["b"])
    assert (found["c"] != found["d"]).any()


def test_statistics_of_mini_batches_on_a_device_are_refused(tmp_path):
    made, samples = setting(tmp_path, "pipar", noise=1.0)
    made.model.name = "own"
    with pytest.raises(RunError, match="keep statistics of mini-batches"):
        support.trained(made, samples, support.model("cnn", norm="batch"))


def test_a_delta_at_which_a_record_could_be_published_is_refused(tmp_path):
    made, samples = setting(tmp_path, "pipar", noise=1.0, delta=1 / 20)
    with pytest.raises(ConfigError, match=r"privacy.delta=0.05 with 33 samples on d1"):
        support.trained(made, samples, support.model())


def test_a_user_whose_weights_are_not_finite_is_not_told_from_others(tmp_path):
    made, samples = of_users(tmp_path, noise_at="device")
    made.optimizer.learning_rate = 1e300  # diverges at once
    run = support.trained(made, samples, support.model())
    assert not [event for event in run.metrics if event["event"] == "nonfinite"]
    assert all(np.isfinite(array).all() for array in weights(run).values())
    assert len(rounds(run)) == 2
