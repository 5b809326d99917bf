"""With which hosts a run begins, and goes on after it was interrupted."""

from __future__ import annotations

import types

import pytest

from pipar_jax.config import Config
from pipar_jax.errors import JoinError
from pipar_jax.methods.registry import hosts_of
from pipar_jax.methods.resolution import resolve
from pipar_jax.roles.assembly import assemble

ALL = ("n1", "n2", "d0", "d1")


def members(here, **fields):
    """The members that are there of a run over two nodes, and the events that are told."""
    config = Config(method="mpsl")
    config.nodes.count, config.devices.count = 2, 2
    for path, value in fields.items():
        group, _, name = path.partition("__")
        setattr(getattr(config, group), name, value)
    config = resolve(config)
    events = []
    made = types.SimpleNamespace(
        by_name=dict.fromkeys(here), hosts=hosts_of(config), tell=events.append,
        poll=lambda timeout_s: None, events=events,
    )  # fmt: skip
    return made, config.cohort


NODES, QUORUM = {"nodes__replicate_every": 1}, {"cohort__quorum": 1}


@pytest.mark.parametrize(
    ("here", "recorded", "fields", "without"),
    [
        (ALL, ALL, {}, None),
        (("n1", "d0", "d1"), ALL, NODES, ["n2"]),
        (("n1", "d0", "d1"), ("n1", "d0", "d1"), NODES, None),  # it was lost before
        (("n1", "n2", "d0"), ALL, QUORUM, ["d1"]),
        (("n1", "n2", "d0"), ("n1", "n2", "d0"), QUORUM, None),
        (("n2", "d1"), ALL, QUORUM, ["n1", "d0"]),
    ],
)
def test_a_resumed_run_goes_on_with_those_that_have_come(here, recorded, fields, without):
    made, cohort = members(here, **fields)
    assemble(made, cohort, 0.0, recorded)
    told = [event for event in made.events if event["event"] == "resumed_without"]
    assert told == ([] if without is None else [{"event": "resumed_without", "missing": without}])


@pytest.mark.parametrize(
    ("here", "recorded", "fields", "says"),
    [
        (("n1", "d0", "d1"), ALL, {}, "n2 of 4 hosts did not join within 0 s"),
        (("d0", "d1"), ALL, NODES, "n1, n2 of 4 hosts"),
        (("n1", "n2", "d0"), ALL, NODES, "d1 of 4 hosts .* and 2 devices are needed"),
        (("n1", "n2"), ALL, QUORUM, "d0, d1 of 4 hosts .* and 1 devices are needed"),
        (("n1", "d0", "d1"), (), NODES, "n2 of 4 hosts"),
        (("n1", "n2", "d0"), (), QUORUM, "d1 of 4 hosts"),
    ],
)
def test_too_few_hosts_are_named(here, recorded, fields, says):
    made, cohort = members(here, **fields)
    with pytest.raises(JoinError, match=says):
        assemble(made, cohort, 0.0, recorded)


def test_a_run_waits_for_as_many_as_it_needs_beyond_those_that_are_configured():
    fields = {"cohort__min_devices": 3, "devices__more": 1, "data__source": "npz:/x.npz"}
    made, cohort = members(ALL, **fields)
    with pytest.raises(JoinError, match=r"1 more hosts did not join .* and 3 devices are needed"):
        assemble(made, cohort, 0.0)
    made, cohort = members((*ALL, "d2"), **fields)
    assemble(made, cohort, 0.0)
