"""Copies of what compute nodes have, and checkpoints: each knows what the other holds."""

from __future__ import annotations

import jax
import pytest

from pipar_jax.errors import RunError
from tests.pipar_jax.roles.test_node_losses import RTOL, conducted, difference, replayed, when
from tests.pipar_jax.roles.test_node_losses import setting as of_nodes
from tests.pipar_jax.runtime import support


@pytest.fixture(scope="module")
def network():
    jax.config.update("jax_enable_x64", True)
    yield support.chain()
    jax.config.update("jax_enable_x64", False)


def setting(folder, rounds, *, copies=2, checkpoints=3, state="device", **cohort):
    made, samples = of_nodes(folder, "mpsl", **cohort)
    made.run.rounds, made.nodes.replicate_every = rounds, copies
    made.checkpoint.every_rounds, made.checkpoint.device_state = checkpoints, state
    return made, samples


def resumed(made, rounds):
    made.run.rounds, made.run.resume = rounds, "auto"
    return made


def told(run):
    """What is left of lost nodes, as it was told and as the script has it."""
    rows = [row["nodes"]["before"] for row in run.script() if "nodes" in row]
    return [event["units"] for event in run.kinds("nodes_replaced")], [one for one in rows if one]


@pytest.mark.soak
@pytest.mark.parametrize("state", ["server", pytest.param("device", marks=pytest.mark.soak)])
def test_a_resumed_run_has_the_copies_of_the_uninterrupted_one(tmp_path, network, state):
    """A node is lost behind the checkpoint, and before what it has is copied again."""
    made, samples = setting(tmp_path / "whole", 5, state=state)
    whole = conducted(made, samples, network, when("checkpoint", None, lambda r: r.end_node(2)))
    assert whole.error is None
    optimizers = 3 if state == "server" else 2
    units = [{"unit": "fc3", "rounds": 3, "optimizer_rounds": optimizers}]
    assert told(whole)[0] == [units]
    made, samples = setting(tmp_path / "parts", 3, state=state)
    assert conducted(made, samples, network).error is None
    lose = when("run_started", None, lambda run: run.end_node(2))
    parts = conducted(resumed(made, 5), samples, network, lose)
    assert parts.error is None
    assert told(parts)[0] == [units]
    assert difference(parts.weights(), whole.weights()) < RTOL


def test_what_a_checkpoint_has_of_a_node_is_told_and_replayed_as_a_copy(tmp_path, network):
    made, samples = setting(tmp_path, 4, copies=0, checkpoints=2, quorum=1)
    run = conducted(made, samples, network, when("checkpoint", None, lambda r: r.end_node(2)))
    assert run.error is None
    units = [{"unit": "fc3", "rounds": 2, "optimizer_rounds": None}]
    assert told(run) == ([units], [[[2, 2]]])
    again = replayed(made, samples, network, run)
    assert difference(again, run.weights()) < RTOL
    made.name, made.checkpoint.every_rounds = "without", 0
    other = conducted(made, samples, network)
    assert isinstance(other.error, RunError)
    assert "with copies of 2 rounds, and here they are of 0" in str(other.error)
    assert "checkpoint.every_rounds" in str(other.error)


@pytest.mark.soak
@pytest.mark.parametrize("state", [pytest.param("server", marks=pytest.mark.soak), "device"])
def test_a_node_that_was_lost_before_the_checkpoint_has_what_is_left_of_it(
    tmp_path, network, state
):
    """It is back when the run is resumed, and the checkpoint has older states of it than of all
    others: that is told, and replayed."""
    made, samples = setting(tmp_path, 3, copies=1, state=state)
    lose = when("round_finished", 2, lambda run: run.end_node(2))
    first = conducted(made, samples, network, lose)
    assert first.error is None and len(first.kinds("node_lost")) == 1
    run = conducted(resumed(made, 5), samples, network)
    assert run.error is None and not run.kinds("node_lost")
    units = [{"unit": "fc3", "rounds": 2, "optimizer_rounds": 2}]
    assert told(run) == ([units], [[[2, 2]]])
    assert "n2" not in {event["host"] for event in run.kinds("state_lost")}
    made.run.resume = ""
    assert difference(replayed(made, samples, network, run), run.weights()) < RTOL
