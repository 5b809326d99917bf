"""Why a device is refused: each reason names what differs and what to do."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace

import pytest

from pipar_jax.config import to_json
from pipar_jax.data import Loader
from pipar_jax.methods.resolution import resolve
from pipar_jax.protocol import registry
from pipar_jax.protocol.values import SIGNATURE
from pipar_jax.roles import admission
from stages.signature import Signature
from tests.pipar_jax.runtime import support

SAMPLES = (17, 33)


@pytest.fixture(scope="module")
def network():
    labels = Signature.labelled(support.SHAPE, support.CLASSES).targets
    return support.model(dtype="float32").receiving(labels)


@pytest.fixture
def config(tmp_path):
    return resolve(support.config(tmp_path, SAMPLES, dtype="float32"))


@pytest.fixture
def body(config, network):
    data = support.dataset(17, 0)
    loader = Loader(data.train, None, config.data.batch_size, seed=config.seed, device=0)
    return wire(admission.device_join(config, "d0", loader, network))


def wire(message):
    """The JSON of a message as it comes over the wire."""
    return json.loads(json.dumps(registry.encode(message)))


def signature(**changes):
    """The signature of a device's samples as it comes over the wire, with changes."""
    made = SIGNATURE.write(Signature.labelled(support.SHAPE, support.CLASSES))
    return {**made, **changes}


def read(body, config, network):
    """What the coordinator makes of a link's first message."""
    return admission.read(SimpleNamespace(kind="control", body=body, name=""), config, network)


def test_a_device_that_fits_is_taken(body, config, network):
    asked, reason = read(body, config, network)
    assert reason is None
    fingerprint = body["fingerprint"]
    who = admission.Identity("d0", samples=17, steps=3, fingerprint=fingerprint)
    assert fingerprint and admission.identity(asked) == who


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            {"type": "hello"},
            "it sent a control message of type 'hello', .* join_device",
        ),
        ({"type": "met"}, r"it sent 'met' with 'control_version'=\d+, expected no such field"),
        ({"control_version": 99, "version": "9.9"}, "it runs version '9.9' .* install the same"),
        ({"control_version": [7]}, r"control messages \[7\]"),
        ({"name": "d2"}, "its name is 'd2', but devices.count=2: .* index of a device .0 to 1"),
        ({"name": 0}, "it sent 'join_device' with name=0, expected a text"),
        ({"name": "n1"}, "its name is 'n1', but nodes.count=0: .* .there are none"),
        ({"config": {"seed": "x"}}, "its configuration differs .* in seed"),
        ({"config": {"nonsense": 1}}, "its configuration cannot be read"),
        ({"config": {"devices": {"count": 10**12}}}, "in devices.count .2 here, 1000000000000 the"),
        ({"config": {"devices": {"more": 10**12}}}, "in devices.more .0 here, 1000000000000 there"),
        ({"config": {"devices": {"count": "2"}}}, "in devices.count .2 here, '2' there"),
        ({"config": {"devices": {"count": 2, "overrides": {"0": {"x": 1}}}}}, "its configuration"),
        ({"units": {}}, "its model differs: unit 'fc1'"),
        ({"samples": 0}, "it has no data to train on"),
        (
            {"samples": 10**12},
            "1000000000000 samples, at most 10000000 are accepted",
        ),
        ({"steps": 10**12}, "1000000000000 steps for 17 samples in mini-batches of 7, expected 3"),
        ({"steps": 2}, "it reports 2 steps for 17 samples in mini-batches of 7, expected 3"),
        ({"samples": 14}, "it reports 3 steps for 14 samples .* expected 2"),
        ({"samples": 2**60}, "with samples=1152921504606846976, expected a whole number"),
        (
            {"signature": signature(classes=11)},
            "samples differ: .* and 11 classes, .* and 10$",
        ),
        ({"signature": signature(input=[[8, 8, 2], "float32"])}, "its samples differ"),
        (
            {"signature": signature(sides={"mask": [[8], "bool"]})},
            "samples differ: .* mask bool",
        ),
        (
            {"signature": signature(targets={"y": [[], "float32"]})},
            "samples differ: .* y float",
        ),
        ({"signature": signature(targets={"y": [[], "object"]})}, "expected one of bool, int32"),
        ({"signature": signature(sides={"": [[8], "bool"]})}, "expected a text of at most 64"),
        ({"steps": None}, "'join_device' with steps=None, expected a whole number"),
        ({"extra": None}, "'join_device' with 'extra'=None, expected no such field"),
    ],
)
def test_a_device_that_does_not_fit_is_told_why(body, config, network, change, reason):
    _, found = read({**body, **change}, config, network)
    assert found is not None
    assert re.search(reason, found), found


def test_a_join_may_not_contradict_what_is_left_out_or_how_often_all_is_seen(body, config, network):
    config.epochs = 2**30
    assert "in 1073741824 epochs" in read({**body, "config": _config(config)}, config, network)[1]
    config.epochs, config.data.drop_last = 1, True
    found = read({**body, "config": _config(config)}, config, network)[1]
    assert "expected 3, and none left over" in found
    fits = {**body, "config": _config(config), "samples": 14, "steps": 2}
    assert read(fits, config, network)[1] is None


def _config(config):
    return json.loads(to_json(config))


def test_what_stays_home_may_differ(body, config, network):
    body["config"]["data"]["cache_dir"] = "elsewhere"
    body["config"]["devices"]["defaults"]["link"] = "4g"
    body["config"]["name"] = "other"
    assert read(body, config, network)[1] is None


def test_a_node_is_taken_by_its_name_and_address(config, network):
    config.method, config.nodes.count, config.pipeline.cuts = "mpsl", 2, "1,2,3"
    body = wire(admission.node_join(config, "n2", ("127.0.0.1", 7001)))
    asked, reason = read(body, config, network)
    assert reason is None
    assert admission.identity(asked) == admission.Identity("n2", address=("127.0.0.1", 7001))
    for address in (None, ["host"], ["host", 0], [7, 7001]):
        _, found = read({**body, "address": address}, config, network)
        assert found is not None and "'join_node' with address" in found
    _, found = read({**body, "name": "d0"}, config, network)
    assert found is not None and "joins as another kind of host" in found


def test_a_reason_shows_what_a_stranger_sent_on_one_printable_line(body, config, network):
    body["config"]["a\x1b[2J\nb"] = 1
    _, reason = read(body, config, network)
    assert reason is not None and reason.isprintable() and "a?[2J?b" in reason
