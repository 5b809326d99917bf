"""A device that is lost leaves what is left where it would be had it been away from that step on.

Over every registered method, policy for weights and moment of a loss; the reference is a run in
which the place's span ends where the loss took effect.
"""

from __future__ import annotations

import jax
import numpy as np
import pytest

from comms import Role
from pipar_jax.methods.registry import METHODS, plan_for
from pipar_jax.methods.resolution import resolve
from pipar_jax.protocol import messages
from pipar_jax.roles.going_back import common_step
from pipar_jax.schedule.actions import Span
from pipar_jax.schedule.rounds import rounds
from tests.patience import PATIENCE_S
from tests.pipar_jax.runtime import support
from tests.pipar_jax.runtime.losses import Conductor, Loss, World

BATCH, STEPS, ROUNDS, MICRO = 6, 2, 3, 3
#: Methods with their policy for weights, or how often a client-side model is handed on.
WAYS = [
    *((method, "copy") for method in METHODS if method != "sl"),
    ("mpsl", "shared"),
    ("sl", "epoch"),
    ("sl", "step"),
]
ROUND, NOTHING = ([Span(place, 0, stop) for place in range(3)] for stop in (STEPS, 0))
UP, DOWN = Role.ACTIVATION, Role.COTANGENT
#: Moments, and whether the device is late and goes on in the next round, or gone.
CASES = [
    ("before the first step", False),
    ("mid-step, forward", True),
    ("mid-step, backward", False),
    ("between steps", True),
    ("last step", True),
    ("last step", False),
    ("averaging", True),
    ("averaging", False),
]
#: Before which tensor of a round a device is lost: its step in the round, micro-batch and role.
MOMENTS = {
    "before the first step": (0, 0, UP),
    "mid-step, forward": (0, 1, UP),
    "mid-step, backward": (0, 1, DOWN),
    "between steps": (1, 0, UP),
    "last step": (1, MICRO - 1, DOWN),
    "averaging": None,
}


def setting(folder, method, way, state="keep"):
    samples = (STEPS * BATCH,) * (1 if METHODS[method].one_device else 3)
    made = support.config(folder, samples, name="mlp", method=method, batch=BATCH)
    # Statistics that devices share follow the order of arrival, like the rounding of their sum.
    made.model.norm = "group" if way == "shared" else "batch"
    made.optimizer.momentum = 0.9
    made.pipeline.cut, made.pipeline.micro_batches = 2, MICRO
    made.aggregation.every, made.epochs = "epoch", ROUNDS
    made.cohort.below, made.cohort.optimizer_state = "repeat", state
    if METHODS[method].uses_nodes:
        made.nodes.count = 1 if METHODS[method].labels_home else 2
        made.pipeline.cuts = "1,2"
        made.pipeline.weights = way
    if way == "shared":
        made.pipeline.dispatch = "fixed"
    if method == "sl":
        made.pipeline.hand_on = way
    return resolve(made), samples


def lost_at(moment, method, spans, place, late):
    """A loss in round 1, for tests; the moment as a tensor's tag says it."""
    if moment is None:
        return Loss(place, 1, None, late)
    step, micro, role = moment
    first = next(span.first for span in spans if span.device == place)
    whole = 1 if method in ("sl", "sfl") else MICRO  # micro-batches of a step

    def is_now(tag):
        at = tag.device, tag.step, tag.micro_batch, tag.role
        return at == (place, first + step, min(micro, whole - 1), role)

    return Loss(place, 1, is_now, late)


@pytest.fixture(scope="module", autouse=True)
def _float64():
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


def network(made):
    return support.model("mlp", "float64", made.model.norm)


def run(made, samples, loss=None, script=None, left_out=()):
    """Returns the variables after a run, what is left of its work, and its script."""
    plan = plan_for(made, network(made).unit_names)
    steps = [-(-n // BATCH) for n in samples]
    with World(made, plan, network(made), samples) as world:
        conductor = Conductor(world)
        away = ()
        for index, spans in enumerate(script or rounds(plan, steps, ROUNDS)):
            if loss is not None and index > loss.round and not loss.late:
                away = (loss.place,)
                spans = [span._replace(stop=span.first) if span.device in away else span
                         for span in spans]  # fmt: skip
            now = loss if loss is not None and loss.round == index else None
            conductor.round(index, spans, now, away, left_out.get(index, ()) if left_out else ())
        # A lost host's memory is gone with its process, whatever it has not read.
        held = [key for key in world.held if key[1] not in world.gone]
        return conductor.variables(), conductor.residues(), conductor.script, held


def assert_equal(found, expected, rtol=0.0):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        most = rtol * np.abs(array).max(initial=0.0)
        np.testing.assert_allclose(found[name], array, rtol=0.0, atol=most, err_msg=name)


def losses():
    """Every case of every way to train; `make test` runs some of each, not always the same."""
    for number, (method, way) in enumerate(WAYS):
        cases = [
            (moment, late)
            for moment, late in CASES
            # With FL no tensor leaves a device; who handed a model on is not needed any more.
            if method not in ("fl", "sl") or (MOMENTS[moment] is None) == (method == "fl")
        ]
        for index, (moment, late) in enumerate(cases):
            name = "-".join((method, way, moment, "late" if late else "lost"))
            marks = [pytest.mark.soak] * ((index - number) % 3 != 0 and method != "fl")
            yield pytest.param(method, way, moment, late, id=name, marks=marks)


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("method", "way", "moment", "late"), [*losses()])
def test_a_loss_leaves_what_a_run_without_the_device_leaves(method, way, moment, late, tmp_path):
    made, samples = setting(tmp_path, method, way)
    plan = plan_for(made, network(made).unit_names)
    spans = rounds(plan, [STEPS] * len(samples), ROUNDS)[1]
    place = len(samples) // 2
    loss = lost_at(MOMENTS[moment], method, spans, place, late)
    found, residues, script, held = run(made, samples, loss)
    assert all(not any(one.values()) for one in residues.values()), residues
    assert not held
    out = {index: (place,) for index in ((1,) if late else (1, 2))}
    expected, _, _, _ = run(made, samples, script=script, left_out=out)
    if not late and plan.order == "parallel":  # its own state is gone with it
        expected = {name: array for name, array in expected.items() if f"d{place} " not in name}
    assert_equal(found, expected, rtol=1e-12 if way == "shared" else 0.0)


def test_without_the_optimiser_state_of_before_a_lost_device_begins_with_a_fresh_one(tmp_path):
    made, samples = setting(tmp_path, "pipar", "copy", "reset")
    loss = Loss(1, 2, None, late=True)
    found, _, _, _ = run(made, samples, loss)
    own, others = (
        {name: array for name, array in found.items() if f"server {place} " in name}
        for place in (1, 0)
    )
    assert own and all(not array.any() for array in own.values())
    assert any(array.any() for array in others.values())


@pytest.mark.parametrize("method", ["pipar", "fl"])
def test_the_anchor_of_a_round_outlives_a_loss(method, tmp_path):
    """An optimiser state of which a step changes only a part."""
    made, samples = setting(tmp_path, method, "copy")
    made.aggregation.proximal_mu = 0.1
    found, _, script, _ = run(made, samples, Loss(1, 1, None, late=True))
    expected, _, _, _ = run(made, samples, script=script, left_out={1: (1,)})
    assert_equal(found, expected)


def test_a_round_in_which_nobody_counts_leaves_the_weights(tmp_path):
    made, samples = setting(tmp_path, "pipar", "copy")
    nobody = {0: (0, 1, 2)}
    found, residues, _, _ = run(made, samples, script=[NOTHING], left_out=nobody)
    assert not any(any(one.values()) for one in residues.values())
    trained, _, _, _ = run(made, samples, script=[ROUND], left_out=nobody)
    assert_equal(trained, found)


class Behind(World):
    """A slow device is a step behind what devices share, and a fast one a step ahead.

    Device 1 does not get a cotangent of a step before device 0 has come two steps further. Device 2
    is lost then.
    """

    slow, fast, lost = 1, 0, 2

    def __init__(self, *args, step):
        super().__init__(*args)
        self.step = step
        self.behind = False

    def carry(self, source, target, tag, array):
        at = tag.device, tag.step, tag.role
        if at == (self.slow, self.step, DOWN) and target == "d1" and not self.gone:
            return False
        if at == (self.fast, self.step + 2, UP) and source == "d0" and not self.gone:
            self.gone.add(f"d{self.lost}")
            self.said.put(("lost", self.lost, {}))
            self.behind = True
        return super().carry(source, target, tag, array)


@pytest.mark.parametrize(("method", "step"), [("pipar", 0), ("pipar", 1), ("mpsl", 1)])
def test_a_fast_device_goes_back_as_far_as_a_slow_one_has_come(method, step, tmp_path):
    """Where gradients are summed: what devices share is between the two."""
    made, samples = setting(tmp_path, method, "shared")
    samples = (4 * BATCH,) * len(samples)
    made.pipeline.weights, made.pipeline.dispatch = "shared", "fixed"
    plan = plan_for(made, network(made).unit_names)
    spans = [Span(place, 0, 4) for place in range(3)]
    with Behind(made, plan, network(made), samples, step=step) as world:
        conductor = Conductor(world)
        conductor.round(0, spans, Loss(world.lost, 0, lambda tag: False))
        assert world.behind
        found, residues, script = conductor.variables(), conductor.residues(), conductor.script
    assert script == [tuple(Span(p, 0, step if p == world.lost else 4) for p in range(3))]
    assert all(not any(one.values()) for one in residues.values()), residues
    expected, _, _, _ = run(made, samples, script=script, left_out={0: (world.lost,)})
    expected = {name: array for name, array in expected.items() if "d2 " not in name}
    assert_equal(found, expected, rtol=1e-12)


class Broken(World):
    """What device 1 sends up in a step is no number; notes which cotangents of it come down."""

    def __init__(self, *args, step):
        super().__init__(*args)
        self.step, self.down = step, []

    def carry(self, source, target, tag, array):
        if (tag.device, tag.step, tag.role) == (1, self.step, UP) and source == "d1":
            array = np.full_like(array, np.nan)
        if (tag.device, tag.role) == (1, DOWN):
            self.down.append(tag.step)
        return super().carry(source, target, tag, array)


@pytest.mark.parametrize("method", ["pipar", "mpsl"])
def test_what_follows_from_a_loss_that_is_not_finite_stays_where_it_is(method, tmp_path):
    """So that no host can take the step after it, and all can go back to it."""
    made, samples = setting(tmp_path, method, "shared")
    samples, step = (4 * BATCH,) * len(samples), 1
    made.pipeline.weights, made.pipeline.dispatch = "shared", "fixed"
    made.run.nonfinite = "drop"
    plan = plan_for(made, network(made).unit_names)
    with Broken(made, plan, network(made), samples, step=step) as world:
        Conductor(world)  # prepares the hosts
        spans = tuple(Span(place, 0, 4) for place in range(3))
        release = messages.Release(0, 1, spans, (0, 1, 2), samples, None, (1.0,) * 3)
        for host in world.hosts.values():
            host.release(release)
        said = {}
        while not any(isinstance(one, messages.NonFinite) for one in said.values()):
            name, one, _ = world.said.get(timeout=PATIENCE_S)
            said[name] = one
        broken = next(one for one in said.values() if isinstance(one, messages.NonFinite))
        assert (broken.what, broken.device, broken.step) == ("loss", 1, step)
        halted = {}
        others = [name for name in world.hosts if name != "d1"]
        for name in others:
            world.hosts[name].halt((1,))
        while len(halted) < len(others):
            name, one, _ = world.said.get(timeout=PATIENCE_S)
            if isinstance(one, messages.Halted):
                halted[name] = one
        assert step not in world.down and step - 1 in world.down
        assert common_step(halted, range(4), step) == (step, {})
