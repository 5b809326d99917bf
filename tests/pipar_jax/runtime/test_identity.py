"""Why a device is refused: each reason names what differs and what to do."""

from __future__ import annotations

import json
import re

import pytest

from pipar_jax.config import resolve
from pipar_jax.data import Loader
from pipar_jax.runtime import identity
from tests.pipar_jax.runtime import support

SAMPLES = (17, 33)


@pytest.fixture(scope="module")
def network():
    return support.model(dtype="float32")


@pytest.fixture
def config(tmp_path):
    return resolve(support.config(tmp_path, SAMPLES, dtype="float32"))


@pytest.fixture
def message(config, network):
    data = support.dataset(17, 0)
    loader = Loader(data.train, None, config.data.batch_size, seed=config.seed, device=0)
    joined = identity.join_message(config, "d0", identity.device_facts(loader, network))
    return json.loads(json.dumps(joined))  # as it comes over the wire


def test_a_device_that_fits_is_taken(message, config, network):
    assert identity.objection(message, config, network) is None
    assert identity.identity(message) == identity.Identity("d0", samples=17, steps=3)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"type": "hello"}, "expected 'join'"),
        ({"control_version": 99, "version": "9.9"}, "it runs version 9.9 .* install the same"),
        ({"name": "d2"}, "it says it is 'd2', but devices.count=2: .* index of a device .0 to 1"),
        ({"name": 0}, "it says it is 0, but devices.count=2"),
        ({"name": "n1"}, "it says it is 'n1', but nodes.count=0: .* .there are none"),
        ({"config": {"seed": "x"}}, "its configuration differs .* in seed"),
        ({"config": {"nonsense": 1}}, "its configuration cannot be read"),
        ({"units": {}}, "its model differs: unit 'fc1'"),
        ({"samples": 0}, "it has no data to train on"),
        ({"steps": None}, "it has no data to train on"),
    ],
)
def test_a_device_that_does_not_fit_is_told_why(message, config, network, change, reason):
    found = identity.objection({**message, **change}, config, network)
    assert found is not None
    assert re.search(reason, found), found


def test_what_stays_home_may_differ(message, config, network):
    message["config"]["data"]["cache_dir"] = "elsewhere"
    message["config"]["devices"]["defaults"]["link"] = "4g"
    message["config"]["name"] = "other"
    assert identity.objection(message, config, network) is None


def test_a_node_is_taken_by_its_name_and_address(config, network):
    config.method, config.nodes.count, config.pipeline.cuts = "mpsl", 2, "1,2,3"
    joined = identity.join_message(config, "n2", identity.node_facts(("127.0.0.1", 7001)))
    message = json.loads(json.dumps(joined))
    assert identity.objection(message, config, network) is None
    assert identity.identity(message) == identity.Identity("n2", address=("127.0.0.1", 7001))
    for address in (None, ["host"], ["host", 0], [7, 7001]):
        found = identity.objection({**message, "address": address}, config, network)
        assert found is not None and "expected host and port" in found
