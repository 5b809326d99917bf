"""Private runs: what leaves devices is clipped, noised and in the ledger first, for all methods."""

from __future__ import annotations

import dataclasses
import json
import queue
from types import SimpleNamespace

import jax
import numpy as np
import pytest

import stages
from pipar_jax.data.loader import Loader, Prefetcher
from pipar_jax.errors import ConfigError, DataError, RunError
from pipar_jax.methods.registry import METHODS, plan_for
from pipar_jax.methods.resolution import resolve
from pipar_jax.privacy.accountant import gaussian_epsilon, noise_for, release_cost
from pipar_jax.privacy.ledger import LEDGER
from pipar_jax.protocol import messages
from pipar_jax.roles.last_words import is_public
from pipar_jax.runtime.host import Host
from pipar_jax.runtime.releases import Releases
from pipar_jax.schedule.actions import FORWARD, Action, Span
from pipar_jax.schedule.plan import DevicePlan
from stages.release import bits_shape
from tests.patience import PROCESS_S
from tests.pipar_jax.runtime import support

SAMPLES = (13, 34)


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
    for name, value in dataclasses.asdict(type(made.privacy)()).items():
        setattr(made.privacy, name, value)
    return made


def weights(run):
    return {
        f"{unit}/{path}": array for unit, some in run.params.items() for path, array in some.items()
    }


def methods(*some):
    """All methods, of which `make test` runs some."""
    return [pytest.param(one, marks=[pytest.mark.soak] * (one not in some)) for one in METHODS]


@pytest.mark.sampled(3, 1)
@pytest.mark.parametrize("method", methods("fl", "pipar", "mpsl"))
def test_without_noise_to_speak_of_a_private_run_is_the_plain_one(method, tmp_path):
    network = support.model()
    made, samples = setting(tmp_path / "private", method)
    private = weights(support.trained(made, samples, network))
    other, _ = setting(tmp_path / "plain", method)
    for name, array in weights(support.trained(plain(other), samples, network)).items():
        np.testing.assert_allclose(private[name], array, rtol=1e-6, atol=1e-8, err_msg=name)


@pytest.mark.sampled(2)
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


@pytest.mark.parametrize("noise_at", ["device", "server"])
def test_a_clip_that_adapts_is_told_to_devices_and_kept(noise_at, tmp_path):
    """Without noise to speak of it comes from far above to where one of two updates is within."""
    made, samples = of_users(tmp_path, noise_at=noise_at, update_clip=10.0, clip_quantile=0.5,
                             clip_rate=2.0, count_noise=1e-3)  # fmt: skip
    made.epochs, made.checkpoint.every_rounds, made.run.resume = 2, 1, "auto"
    first = support.trained(made, samples, support.model())
    shares = [one["within_clip"] for one in rounds(first)]
    clips = [10.0, *(one["clip"] for one in rounds(first))]
    assert shares == [pytest.approx(1.0, abs=0.01)] * 2  # all of them, so that the clip falls
    for before, after, share in zip(clips, clips[1:], shares, strict=False):
        assert after == pytest.approx(before * np.exp(-2.0 * (min(share, 1.0) - 0.5)))
    made.epochs = 6
    run = support.trained(made, samples, support.model())
    assert [one["round"] for one in rounds(run)] == list(range(6))
    clips = [one["clip"] for one in rounds(run)]
    assert clips[2] < clips[1]  # it goes on from there
    shares = [round(2 * one["within_clip"]) for one in rounds(run)]
    assert set(shares[:2]) == {2} and min(shares) <= 1  # it came to where some are clipped
    (promise,) = [event for event in run.metrics if event["event"] == "private"][:1]
    assert any("0.5 quantile" in word for word in promise["words"])
    path = run.folder / "hosts" / ("d0" if noise_at == "device" else "server/d0") / LEDGER
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["what"] for line in lines] == [["updates", "counts"]] * 6
    assert all(line["cost"] == pytest.approx(release_cost(made.privacy.noise)) for line in lines)


@pytest.mark.parametrize("clip", [0.0, 1e-9, 1e9])
def test_a_device_follows_no_clip_that_is_none_of_its_run(clip, tmp_path):
    made, _ = of_users(tmp_path, clip_quantile=0.5)
    with pytest.raises(RunError, match="no clip of a run that begins with"):
        Releases(resolve(made), "d0").start_attempt(clip)


def test_a_device_whose_ledger_is_gone_does_not_go_on(tmp_path):
    made, samples = setting(tmp_path, "fl", noise=2.0)
    made.aggregation.every, made.checkpoint.every_rounds, made.run.resume = "epoch", 1, "auto"
    made.epochs = 1
    run = support.trained(made, samples, support.model())
    before = epsilons(run)
    made.epochs = 2
    run = support.trained(made, samples, support.model())
    promise = [event for event in run.metrics if event["event"] == "private"][-1]
    assert promise["epsilon"] == before  # shown before anything more is released
    (run.folder / "hosts" / "d1" / LEDGER).unlink()
    made.epochs = 3
    with pytest.raises(RunError, match=r"device 1 cannot go on: its ledger comes to epsilon 0"):
        support.trained(made, samples, support.model())


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
                draw = releases.draw(stages.make_draw(7), action, stage, 3)
                assert draw.noise.shape == bits_shape(3 * 128)
            taken += 1
        releases.close()
    assert taken == 4
    releases = Releases(resolve(made), "d0")
    releases.expect(14)
    releases.calibrate(plan, 4)
    with pytest.raises(RunError, match=r"d0 has released epsilon .* would exceed that"):
        releases.draw(stages.make_draw(7), Action(0, FORWARD, 0, 0, 0), stage, 3)
    assert releases.spent == pytest.approx(4 * release_cost(2.0))


HOME = {"labels": "home", "cotangent_clip": 0.1}
WRONG_PLANS = [
    ("fl", {}, (2,), ("device", "server")),
    ("fl", USERS, (2,), ("device", "server")),
    ("pipar", {}, (1, 2, 3), ("device", "server", "device", "server")),
    ("mpsl", HOME, (2,), ("device", "n1")),
    ("mpsl", HOME, (1, 2, 3), ("device", "n1", "device", "n1")),
]


@pytest.mark.parametrize(("method", "privacy", "cuts", "hosts"), WRONG_PLANS)
def test_a_device_follows_no_plan_that_sends_what_it_keeps(method, privacy, cuts, hosts, tmp_path):
    """The plan is the server's word; the configuration is the device's own."""
    made, _ = setting(tmp_path, method, noise=2.0, **privacy)
    made.aggregation.weighted, made.epochs = "unit" not in privacy, 2
    made.aggregation.every = "epoch"
    if "labels" in privacy:
        made.pipeline.labels = "home"
    releases = Releases(resolve(made), "d0")
    releases.expect(14)
    with pytest.raises(RunError, match="a private device does not follow it"):
        releases.calibrate(DevicePlan(cuts, hosts), 4)
    with pytest.raises(RunError, match="a private device does not follow it"):
        releases.stages(support.model(), DevicePlan(cuts, hosts))


@pytest.mark.parametrize("labels", ["unprotected", "home"])
def test_cotangents_without_noise_tell_of_labels_alone(labels, tmp_path):
    privacy = HOME if labels == "home" else {}
    made, _ = setting(tmp_path, "mpsl", noise=2.0, **privacy)
    made.pipeline.labels = "home"
    names = ("a", "b", "c")
    units = [SimpleNamespace(name=one, state={}, sides=("mask",) * (one == "c")) for one in names]
    model = SimpleNamespace(units=units, shapes=lambda n: [np.zeros((n, 5))] * 3)
    releases, plan = Releases(resolve(made), "d0"), DevicePlan((1, 2), ("device", "n1", "device"))
    releases.expect(14)
    releases.calibrate(plan, 4)
    if labels == "home":
        assert releases.stages(model, plan)[2].cotangent_clip
    else:
        with pytest.raises(RunError, match=r"functions of its side inputs \['mask'\]"):
            releases.stages(model, plan)


def test_what_an_error_says_of_data_does_not_leave():
    public = [RunError("its budget is spent"), ConfigError("x")]
    for cause in (RunError("y"), OSError("disk full")):
        error = RunError("x")
        error.__cause__ = cause
        public.append(error)
    assert all(map(is_public, public))
    error = RunError("x")
    error.__cause__ = ValueError("patient 17")
    assert not any(map(is_public, (error, DataError("label 12 of sample 7"), ValueError("z"))))


def test_labels_given_anew_for_other_data_count_and_end_at_the_budget(tmp_path):
    privacy = {"noise": 2.0, "epsilon": 5.0, "labels": "randomised", "label_epsilon": 2.0}
    made, _ = setting(tmp_path, "pipar", **privacy)
    plan = DevicePlan((2,), ("device", "server"))
    limits = []
    for seed in (0, 1):
        releases = Releases(resolve(made), "d0")
        releases.protect(support.dataset(14, seed))
        releases.expect(14)
        releases.calibrate(plan, 4)
        limits.append(gaussian_epsilon(releases.guarantee.limit, made.privacy.delta))
        releases.close()
    assert limits == [pytest.approx(3.0), pytest.approx(1.0)]
    with pytest.raises(RunError, match=r"come to epsilon 6 of privacy.epsilon=5"):
        Releases(resolve(made), "d0").protect(support.dataset(14, 2))


def test_a_run_that_continues_one_that_continued_another_counts_all(tmp_path):
    made, samples = setting(tmp_path, "fl", noise=2.0)
    made.aggregation.every, made.checkpoint.every_rounds = "epoch", 1
    for epochs, name in enumerate(("first", "second", "third"), 1):
        made.epochs, made.name = epochs, name
        run = support.trained(made, samples, support.model())
        made.run.resume = str(run.folder)
    spent = gaussian_epsilon(3 * release_cost(2.0), made.privacy.delta)
    assert epsilons(run) == {name: pytest.approx(spent) for name in ("d0", "d1")}


def test_a_user_never_trains_on_from_weights_that_were_not_given(tmp_path):
    """Else the update's noise would hide the last round alone, and not those given up before."""
    made, _ = of_users(tmp_path)
    made.devices.count = 1
    made = resolve(made)
    model, said, failed = support.model(), queue.Queue(), queue.Queue()
    loader = Loader(support.dataset(14, 0).train, None, 7, seed=0, device=0)
    batches, releases = Prefetcher(loader), Releases(made, "d0")
    releases.expect(14)
    host = Host("d0", model, made, reply=lambda *one: said.put(one), failed=failed.put,
                batches=batches, releases=releases)  # fmt: skip
    try:
        host.prepare(plan_for(made, model.unit_names), (14,), (4,))
        for attempt in (1, 2):
            host.release(messages.Release(0, attempt, (Span(0, 0, 2),), (0,), (14,), None, (1.0,)))
            if attempt == 1:
                while not isinstance(said.get(timeout=PROCESS_S)[0], messages.Trained):
                    pass
        with pytest.raises(RunError, match="function of its user's data"):
            raise failed.get(timeout=PROCESS_S)
    finally:
        host.close()
        batches.close()
        releases.close()


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
    first = support.trained(made, samples, support.model())
    (promise,) = [event for event in first.metrics if event["event"] == "private"]
    assert promise["epsilon"] == {}  # nothing was released before, whatever labels will cost
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
    made.data.source = "module:own:data"  # whose number nobody else knows
    with pytest.raises(ConfigError, match=r"privacy.delta=0.05 with 34 samples on d1"):
        support.trained(made, samples, support.model())


def test_a_user_whose_weights_are_not_finite_is_not_told_from_others(tmp_path):
    made, samples = of_users(tmp_path, noise_at="device")
    made.optimizer.learning_rate = 1e300  # diverges at once
    run = support.trained(made, samples, support.model())
    assert not [event for event in run.metrics if event["event"] == "nonfinite"]
    assert all(np.isfinite(array).all() for array in weights(run).values())
    assert len(rounds(run)) == 2
