"""What is known of the registered networks without jax is what they are."""

from __future__ import annotations

import types
from typing import Any

import pytest

import stages
from stages.names import TOKEN_MODELS, UNITS
from stages.registry import Model


def test_the_units_that_a_launcher_knows_are_those_of_the_networks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def names(name: str, units: Any, *rest: Any, **options: Any) -> types.SimpleNamespace:
        # Tracing each network would take long.
        return types.SimpleNamespace(unit_names=tuple(unit for unit, _ in units))

    monkeypatch.setattr(Model, "from_units", staticmethod(names))
    assert tuple(UNITS) == stages.MODELS
    for name, units in UNITS.items():
        shape = (8,) if name in TOKEN_MODELS else (8, 8, 1)
        for norm, stem in zip(stages.NORMS, stages.STEMS, strict=True):
            found: Any = stages.build(name, input_shape=shape, classes=3, norm=norm, stem=stem)
            assert found.unit_names == units, name
