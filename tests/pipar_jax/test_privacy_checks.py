"""What a private run cannot keep is refused with one line, before any process is started."""

from __future__ import annotations

import numpy as np
import pytest

from pipar_jax.config import Config
from pipar_jax.errors import ConfigError
from pipar_jax.launch import machine
from pipar_jax.methods.privacy_checks import WITHOUT_STATISTICS
from pipar_jax.methods.registry import METHODS
from pipar_jax.methods.resolution import resolve
from stages.names import MODELS

RECORD = {"privacy.epsilon": 8.0, "privacy.update_clip": 1.0, "model.norm": "group"}
CUT = {**RECORD, "privacy.activation_clip": 1.0}
HOME = {**CUT, "method": "mpsl", "nodes.count": 1, "pipeline.cuts": "1,2",
        "privacy.labels": "home", "privacy.cotangent_clip": 0.1}  # fmt: skip
USER = {**RECORD, "method": "fl", "privacy.unit": "user", "aggregation.weighted": False}


def made(values) -> Config:
    config = Config()
    for path, value in values.items():
        *groups, field = path.split(".")
        target = config
        for group in groups:
            target = getattr(target, group)
        assert hasattr(target, field)
        setattr(target, field, value)
    return config


@pytest.mark.parametrize("values", [
    {**RECORD, "method": "fl"},
    {**RECORD, "method": "fl", "privacy.labels": "home"},
    CUT,
    {**CUT, "privacy.labels": "randomised", "privacy.label_epsilon": 2.0},
    HOME,
    {**HOME, "privacy.labels": "unprotected", "privacy.cotangent_clip": 0.0},
    {**HOME, "privacy.labels": "randomised", "privacy.label_epsilon": 2.0,
     "privacy.cotangent_clip": 0.0},
    USER,
    {**USER, "privacy.noise_at": "server"},
    {**USER, "privacy.clip_quantile": 0.5, "privacy.count_noise": 30.0, "privacy.clip_rate": 0.5},
    {**USER, "aggregation.every": "5 steps", "run.rounds": 3},
    {**CUT, "model.name": "mlp", "model.norm": "batch"},
])  # fmt: skip
def test_what_can_be_kept_is_accepted(values):
    assert resolve(made(values)).privacy.on


REFUSED = [
    ({"privacy.epsilon": 0.0}, r"privacy.epsilon=0.0 is out of range"),
    ({"privacy.epsilon": -1.0}, r"privacy.epsilon=-1.0 is out of range"),
    ({"privacy.delta": 1.0}, r"privacy.delta=1.0 is out of range"),
    ({"privacy.noise": 0.0}, r"privacy.noise=0.0 is out of range"),
    ({"privacy.update_clip": 1.0}, r"update_clip=1.0 has no effect: set privacy.epsilon"),
    ({"privacy.reproducible": True}, r"reproducible=True has no effect"),
    ({**CUT, "privacy.activation_clip": 0.0}, r"activation_clip=0, but activations leave"),
    ({**CUT, "privacy.update_clip": 0.0}, r"update_clip=0, but the weights that leave"),
    ({**CUT, "method": "fl"}, r"activation_clip=1, but no activation leaves"),
    ({**CUT, "privacy.cotangent_clip": 1.0}, r"cotangent_clip=1, but it is for labels=home"),
    ({**HOME, "privacy.cotangent_clip": 0.0}, r"cotangent_clip=0, but cotangents leave"),
    ({**CUT, "privacy.labels": "home"}, r"labels=home, but labels travel with method=pipar"),
    ({**CUT, "privacy.labels": "randomised"}, r"randomised and privacy.label_epsilon belong"),
    ({**CUT, "privacy.label_epsilon": 1.0}, r"randomised and privacy.label_epsilon belong"),
    ({**RECORD, "method": "fl", "privacy.labels": "randomised", "privacy.label_epsilon": 1.0},
     r"no effect with method=fl"),
    ({**CUT, "privacy.labels": "randomised", "privacy.label_epsilon": 8.0}, r"leaves nothing of"),
    ({**CUT, "method": "auto"}, r"privacy cannot be combined with method=auto"),
    ({**CUT, "tuner.adapt": True}, r"tuner.adapt=true cannot be combined with privacy"),
    ({**CUT, "model.norm": "batch"}, r"model.norm=batch couples the samples"),
    ({**CUT, "privacy.noise_at": "server"}, r"noise_at=server is for privacy.unit=user"),
    ({**CUT, "privacy.unit": "user", "aggregation.weighted": False}, r"activation for each record"),
    ({**USER, "aggregation.weighted": True}, r"averages with public weights"),
    ({**USER, "aggregation.every": "5 steps"}, r"counts rounds"),
    ({**USER, "checkpoint.every_rounds": 1, "checkpoint.device_state": "server"},
     r"optimiser states are functions"),
    ({**CUT, "data.train_samples": 1000, "privacy.delta": 0.01}, r"would allow to publish"),
    ({**CUT, "data.source": "mnist", "privacy.delta": 1 / 30_000},
     r"with 30000 samples on a device would allow to publish one of them: set it below 3.3e-05"),
    ({**CUT, "data.source": "digits", "privacy.delta": 0.01}, r"with 719 samples"),
    ({**USER, "privacy.delta": 0.5}, r"would allow to publish"),
    ({**CUT, "privacy.clip_quantile": 0.5}, r"clip_quantile=0.5 is for privacy.unit=user"),
    ({**USER, "privacy.clip_quantile": 1.0}, r"clip_quantile=1.0 is out of range"),
    ({**USER, "privacy.clip_rate": 0.1}, r"clip_rate=0.1 has no effect without"),
    ({**USER, "privacy.count_noise": 9.0}, r"count_noise=9 has no effect without"),
    ({**USER, "privacy.clip_quantile": 0.5, "privacy.count_noise": 0.1},
     r"count_noise=0.1 makes the count of clipped updates cost more .* set it above"),
    ({**CUT, "privacy.activation_clip": 1e-12}, r"activation_clip=1e-12 is too small"),
]  # fmt: skip


@pytest.mark.parametrize(("values", "message"), REFUSED, ids=[one[1][:40] for one in REFUSED])
def test_what_cannot_be_kept_is_refused(values, message):
    with pytest.raises(ConfigError, match=message) as refused:
        resolve(made(values))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_says_what_is_missing_for_privacy(method):
    values = {"privacy.epsilon": 1.0, "method": method, "model.norm": "group"}
    if METHODS[method].uses_nodes:
        values["nodes.count"] = 1
    values["devices.count"] = 1
    with pytest.raises(ConfigError, match=r"privacy\.\w+_clip=0"):
        resolve(made(values))


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", MODELS)
def test_the_networks_without_batch_statistics_are_those_listed(name):
    import stages

    shape = (8,) if name.startswith(("decoder", "gpt")) else (32, 32, 3)
    model = stages.build(name, input_shape=shape, classes=10, norm="batch")
    below = model.units[0]
    assert bool(below.state) == (name not in WITHOUT_STATISTICS)


def test_a_delta_is_held_against_the_samples_of_a_file_before_hosts_start(tmp_path):
    np.savez(tmp_path / "own.npz", x_train=np.zeros((40, 3)), y_train=np.zeros(40, int))
    own = f"npz:{tmp_path}/own.npz"
    values = {**CUT, "data.source": own, "data.test_source": own}
    machine.check(resolve(made({**values, "privacy.delta": 0.02})))
    with pytest.raises(ConfigError, match=r"privacy.delta=0.03 with 40 samples of npz:.*own\.npz"):
        machine.check(resolve(made({**values, "privacy.delta": 0.03})))
