"""A clip that nothing reaches, or everything exceeds, is said once, and to the device alone."""

from __future__ import annotations

import pytest

from pipar_jax.config import PrivacyConfig
from pipar_jax.privacy.clip_watch import ClipWatch
from pipar_jax.privacy.policy import ACTIVATIONS, COTANGENTS, GRADIENTS, UPDATES

FIELDS = {
    ACTIVATIONS: ("activation_clip", 50),
    GRADIENTS: ("update_clip", 50),
    COTANGENTS: ("cotangent_clip", 50),
    UPDATES: ("update_clip", 2),
}


@pytest.mark.parametrize("kind", FIELDS)
@pytest.mark.parametrize("share", [0, 1])
def test_never_and_always_are_said_once_when_enough_was_seen(kind, share):
    field, half = FIELDS[kind]
    watch = ClipWatch(PrivacyConfig(**{field: 0.25}))
    watch.add(kind, share * (half - 1), half - 1)
    assert watch.warnings() == []
    watch.add(kind, share * (half + 1), half + 1)
    (said,) = watch.warnings()
    assert f"privacy.{field}=0.25" in said and f"first {2 * half} {kind}" in said
    assert ("all of" if share else "none of") in said
    watch.add(kind, share * half, half)
    assert watch.warnings() == []


def test_nothing_is_said_of_a_clip_that_is_reached_sometimes():
    watch = ClipWatch(PrivacyConfig(update_clip=1.0))
    watch.add(GRADIENTS, 1, 1000)
    watch.add(GRADIENTS, 1000, 1000)
    assert watch.warnings() == []
