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
    joined = identity.join_message(config, 0, loader, network)
    return json.loads(json.dumps(joined))  # as it comes over the wire


def test_a_device_that_fits_is_taken(message, config, network):
    assert identity.objection(message, config, network) is None
    assert identity.identity(message) == identity.Identity(index=0, samples=17, steps=3)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"type": "hello"}, "expected 'join'"),
        ({"control_version": 99, "version": "9.9"}, "it runs version 9.9 .* install the same"),
        ({"index": 2}, "it says it is device 2, but devices.count=2: start it with an index"),
        ({"index": "0"}, "it says it is device 0"),
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
