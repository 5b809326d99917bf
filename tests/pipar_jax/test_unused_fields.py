"""Every field of the configuration either has an effect, is refused, or is exempt for a reason.

The list of fields is the schema's: one that is added without an entry here fails the test.
"""

from __future__ import annotations

from typing import Any

import pytest

from pipar_jax.config import Config, schema
from pipar_jax.errors import ConfigError
from pipar_jax.methods.resolution import resolve
from pipar_jax.methods.unused_checks import NEEDS

FIELDS = {one.path: one for one in schema.options(Config)}
LOSSES = {"cohort.quorum": 1}
OWN = {"data.source": "npz:/some/where.npz"}
#: For each field that needs another one, a value of it, and changes that give it an effect.
NEEDING: dict[str, tuple[Any, dict[str, Any]]] = {
    "lora.rank": (4, {"lora.match": "attention", "model.name": "vit_small"}),
    "lora.alpha": (4.0, {"lora.match": "attention", "model.name": "vit_small"}),
    "optimizer.nesterov": (True, {}),
    "optimizer.beta2": (0.9, {"optimizer.name": "adam"}),
    "optimizer.epsilon": (0.1, {"optimizer.name": "adamw"}),
    "optimizer.drop_every": (5, {"optimizer.schedule": "step"}),
    "optimizer.drop_factor": (0.5, {"optimizer.schedule": "step"}),
    "aggregation.momentum": (0.5, {"aggregation.rule": "fedavgm"}),
    "aggregation.beta2": (0.5, {"aggregation.rule": "fedyogi"}),
    "aggregation.epsilon": (0.5, {"aggregation.rule": "fedadam"}),
    "data.alpha": (0.1, {"data.partition": "dirichlet"}),
    "data.shards_per_device": (3, {"data.partition": "labels"}),
    "cohort.select": ("by_samples", {"cohort.size": 1}),
    "cohort.deadline_s": (5.0, LOSSES),
    "cohort.optimizer_state": ("reset", LOSSES),
    "cohort.wait_s": (5.0, {"cohort.min_devices": 1}),
    "checkpoint.keep": (2, {"checkpoint.every_rounds": 1}),
    "checkpoint.best": ("accuracy", {"checkpoint.every_s": 1.0}),
    "checkpoint.device_state": ("server", {"checkpoint.every_rounds": 1}),
    "stop.metric": ("loss", {"stop.patience": 2}),
    "tuner.gain": (0.2, {"tuner.adapt": True}),
    "tuner.look_s": (1.0, {"tuner.adapt": True}),
    "tuner.activation_bits": (6, {"tuner.codecs": "auto"}),
    "tuner.cotangent_bits": (6, {"tuner.codecs": "auto"}),
}
#: Fields of a public data set, or that evaluations use: changes under which they have no effect.
IDLE: dict[str, tuple[Any, dict[str, Any]]] = {
    "optimizer.nesterov": (True, {"optimizer.momentum": 0.0}),
    "data.partition": ("labels", OWN),
    "data.train_samples": (100, OWN),
    "data.test_samples": (100, OWN),
    "stop.patience": (2, {"run.evaluate_every": 0}),
    "stop.target": (0.5, {"run.evaluate_every": 0}),
    "checkpoint.best": ("loss", {"run.evaluate_every": 0, "checkpoint.every_rounds": 1}),
}
#: Fields that other checks refuse where they have no effect, with such a value.
ELSEWHERE: dict[str, Any] = {
    "model.args": "width=2", "model.weights_match": "conv*", "optimizer.args": "decay=1",
    "optimizer.schedule_args": "power=1", "aggregation.args": "trim=1", "aggregation.liars": 1,
    "aggregation.update_bound": 1.0, "pipeline.cuts": "1,2", "pipeline.in_flight": 1,
    "nodes.replicate_every": 1, "data.classes": 3, "data.scale": 2.0,
    "data.test_source": "npz:x.npz", "devices.more": 1, "run.nonfinite": "drop",
    "network.require_certificate": True, "privacy.delta": 1e-6, "privacy.unit": "user",
    "privacy.activation_clip": 1.0, "privacy.update_clip": 1.0, "privacy.cotangent_clip": 1.0,
    "privacy.noise_at": "server", "privacy.labels": "randomised", "privacy.label_epsilon": 1.0,
    "privacy.accountant": "rdp", "privacy.reproducible": True,
}  # fmt: skip
#: Why the fields in a group that are not above may be set in any run.
EXEMPT = {
    "": "name, seed, method, epochs, debug: of every run",
    "model": "the network; norm and stem are of some networks, which a preset leaves open",
    "task": "the task; what does not fit its arguments is refused",
    "lora": "match turns adapters on",
    "data": "the samples and this machine's folders",
    "optimizer": "of every replica",
    "aggregation": "of every average",
    "pipeline": "of some methods, which a preset leaves open",
    "devices": "of every run",
    "nodes": "of some methods, which a preset leaves open",
    "cohort": "they turn something on",
    "server": "of every run",
    "network": "of every link; insecure allows something that may not be needed",
    "privacy": "epsilon and noise turn it on",
    "tuner": "of every search, also that of pipar plan",
    "checkpoint": "they turn something on",
    "stop": "they turn something on",
    "run": "of every run",
}


def changed(path: str, value: Any, others: dict[str, Any]) -> Config:
    config = Config()
    for name, other in {**others, path: value}.items():
        holder: Any = config
        *groups, leaf = name.split(".")
        for group in groups:
            holder = getattr(holder, group)
        setattr(holder, leaf, other)
    return config


def test_every_field_is_listed() -> None:
    listed = {field for need in NEEDS for field in need.fields}
    assert listed == {*NEEDING, *IDLE}
    groups = {path.rpartition(".")[0].split(".")[0] for path in FIELDS}
    assert groups == set(EXEMPT) and all(EXEMPT.values())
    assert set(ELSEWHERE) <= set(FIELDS)


@pytest.mark.parametrize("path", NEEDING)
def test_a_field_without_effect_is_refused_and_told_what_it_needs(path: str) -> None:
    value, needed = NEEDING[path]
    if value != FIELDS[path].default and needed:
        with pytest.raises(ConfigError, match=rf"^{path}=.* has no effect without .*; set that"):
            resolve(changed(path, value, {}))
    resolve(changed(path, value, needed))


@pytest.mark.parametrize("path", IDLE)
def test_a_field_whose_effect_another_one_turns_off_is_refused(path: str) -> None:
    value, others = IDLE[path]
    with pytest.raises(ConfigError, match=rf"^{path}=.* has no effect without "):
        resolve(changed(path, value, others))
    if path != "optimizer.nesterov":  # it is above
        kept = {"checkpoint.every_rounds": 1} if path == "checkpoint.best" else {}
        resolve(changed(path, value, kept))


@pytest.mark.parametrize("codecs", ["", "safe", "raw"])
def test_bits_have_no_effect_where_no_codec_is_chosen_by_them(codecs: str) -> None:
    with pytest.raises(ConfigError, match=r"has no effect without tuner\.codecs=auto or a list"):
        resolve(changed("tuner.activation_bits", 6, {"tuner.codecs": codecs}))


@pytest.mark.parametrize("path", ELSEWHERE)
def test_a_field_that_belongs_to_others_is_refused_alone(path: str) -> None:
    with pytest.raises(ConfigError, match=path.replace(".", r"\.")):
        resolve(changed(path, ELSEWHERE[path], {}))


def test_fields_about_data_may_stay_where_a_program_passes_its_data() -> None:
    resolve(changed("data.train_samples", 100, OWN), reads_data=False)


def test_a_replay_keeps_the_fields_of_the_run_that_it_replays(tmp_path: Any) -> None:
    script = tmp_path / "membership.jsonl"
    script.touch()
    resolve(changed("cohort.optimizer_state", "reset", {"cohort.script": str(script)}))


@pytest.mark.parametrize(("metric", "target"), [("", 1.5), ("accuracy", 95.0), ("", -0.1)])
def test_a_target_that_no_share_reaches_is_refused(metric: str, target: float) -> None:
    with pytest.raises(ConfigError, match=r"stop\.target=.* is never reached: accuracy of task"):
        resolve(changed("stop.target", target, {"stop.metric": metric}))
    resolve(changed("stop.target", target, {"stop.metric": "loss"}))
