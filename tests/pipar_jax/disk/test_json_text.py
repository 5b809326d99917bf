"""JSON that every reader takes, and that nothing is written in another way."""

from __future__ import annotations

import ast
import json
import math

import numpy as np
import pytest

from pipar_jax.config import Config
from pipar_jax.config.schema import check
from pipar_jax.disk.json_text import dumps, plain
from pipar_jax.errors import ConfigError
from tests.sources import ROOT

VALUE = {
    "loss": math.nan, "of": [1.5, -math.inf, (np.float32("inf"), np.arange(2))], "n": np.int64(3),
    "text": "NaN", "flag": True, "none": None, "path": ROOT,
}  # fmt: skip


def test_numbers_that_are_not_finite_become_null():
    def refuse(text):
        raise AssertionError(text)

    read = json.loads(dumps(VALUE, indent=1), parse_constant=refuse)
    assert read == {
        "loss": None, "of": [1.5, None, [None, [0, 1]]], "n": 3,
        "text": "NaN", "flag": True, "none": None, "path": str(ROOT),
    }  # fmt: skip
    assert plain(VALUE) == read


def test_nothing_is_written_by_another_writer():
    """``comms`` has JSON of its own: handshakes and control messages, whose fields are typed."""
    found = []
    for folder in ("pipar_jax", "experiments", "configs", "stages"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                writes = isinstance(node, ast.Attribute) and node.attr in ("dump", "dumps")
                if writes and getattr(node.value, "id", "") == "json":
                    found.append(path.relative_to(ROOT).as_posix())
    assert found == ["pipar_jax/disk/json_text.py"]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_configuration_holds_finite_numbers(value):
    config = Config()
    config.optimizer.learning_rate = value
    with pytest.raises(ConfigError, match=r"optimizer\.learning_rate=(nan|inf) is not valid"):
        check(config)
