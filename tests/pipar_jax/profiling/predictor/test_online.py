"""A device is learned from the stages of a training, and what was learned stays."""

from __future__ import annotations

import numpy as np
import pytest

import stages
from pipar_jax.profiling.predictor import online
from pipar_jax.profiling.predictor.online import Learner
from pipar_jax.profiling.predictor.operators import model_operators, rows
from pipar_jax.profiling.predictor.predict_host import one_call, predict_host
from pipar_jax.schedule.actions import BACKWARD, FORWARD, LOSS
from pipar_jax.simulator.predict import HostTimes
from tests.pipar_jax.profiling.predictor import synthetic

BATCH = 16


def network() -> stages.Model:
    return stages.build("vgg8", input_shape=(16, 16, 3), classes=10)


class Course:
    """A training on a device that follows a law of its own, unlike those trained on."""

    def __init__(self, seed: int = 5) -> None:
        self.law, self.model = synthetic.Law(seed), network()
        self.law.flops = self.law.flops * np.exp(
            0.6 * np.random.default_rng(seed).normal(size=self.law.flops.shape)
        )
        self.learner = Learner(self.model, synthetic.reference_times(self.law), synthetic.weights())
        self.units = [rows(one) for one in model_operators(self.model, None, BATCH)]
        self.factor = 1.0

    def seconds(self, kind: str, first: int, stop: int) -> float:
        table = np.concatenate(one_call(self.units[first:stop]))
        ahead, back = self.law.forward_s(table), self.law.backward_s(table)
        found = {FORWARD: ahead, BACKWARD: back, LOSS: ahead + back - self.law.call_s}[kind]
        return found * self.factor

    def train(self, cut: int) -> None:
        for kind in (FORWARD, BACKWARD):
            self.learner.observe((kind, 0, cut, BATCH), self.seconds(kind, 0, cut))
        self.learner.learn()

    def error(self, cut: int) -> float:
        return max(
            abs(self.learner.predict_s((kind, 0, cut, BATCH)) / self.seconds(kind, 0, cut) - 1)
            for kind in (FORWARD, BACKWARD)
        )


def test_a_stage_that_was_seen_is_known_and_stays_known_under_another_cut():
    course = Course()
    before = course.error(3)
    course.train(3)
    known = course.error(3)
    assert known < before or before < 0.02
    for _ in range(6):
        course.train(6)
    assert course.error(6) < 0.1
    assert course.error(3) < max(2 * known, 0.1)  # replayed, not forgotten


def test_what_cuts_teach_helps_where_nothing_was_seen():
    course = Course(9)
    cuts = range(1, len(course.units))
    before = np.mean([course.error(cut) for cut in cuts])
    for cut in (2, 4, 6):
        course.train(cut)
    assert np.mean([course.error(cut) for cut in cuts]) < before


def test_a_device_that_slows_down_is_noticed():
    course = Course()
    for _ in range(3):
        course.train(4)
    course.factor = 3.0
    before = course.error(4)
    course.train(4)
    assert before > 0.6 and course.error(4) < 0.15
    assert course.error(2) < 0.4  # what is remembered keeps pace
    slower = course.learner.profile((BATCH,))
    course.factor = 1.0
    course.train(4)
    ratio = sum(slower.update_s) / sum(course.learner.profile((BATCH,)).update_s)
    assert ratio == pytest.approx(3.0, rel=0.1)


def test_observed_stages_teach_the_predictions_of_their_host():
    course, count = Course(), len(network().units)
    for kind in (FORWARD, BACKWARD):
        course.learner.observe((kind, 0, 3, BATCH), course.seconds(kind, 0, 3))
    course.learner.learn()
    assert course.error(3) < 0.1
    server = Learner(course.model, synthetic.reference_times(course.law), synthetic.weights())
    server.observe((LOSS, 3, count, BATCH), course.seconds(LOSS, 3, count))
    server.learn()
    case, seconds = (LOSS, 3, count, BATCH), course.seconds(LOSS, 3, count)
    fresh = Learner(course.model, synthetic.reference_times(course.law), synthetic.weights())
    before = abs(fresh.predict_s(case) / seconds - 1)
    assert abs(server.predict_s(case) / seconds - 1) < before


def test_only_so_many_cases_are_remembered_and_no_time_is_no_time(monkeypatch):
    monkeypatch.setattr(online, "CASES", 3)
    course = Course()
    course.learner.observe((FORWARD, 0, 1, BATCH), 0.0)
    for samples in range(1, 8):
        course.learner.observe((FORWARD, 0, 1, samples), 1e-3)
    course.learner.learn()
    assert [case[3] for case in course.learner.cases] == [5, 6, 7]


def test_a_profile_holds_what_is_known():
    course = Course()
    course.train(4)
    profile = course.learner.profile((4, BATCH))
    assert profile.sizes == (4, BATCH)
    times = HostTimes(profile)
    for kind, stop in ((FORWARD, 4), (BACKWARD, 4)):
        predicted = course.learner.predict_s((kind, 0, stop, BATCH))
        assert times.time_s(kind, 0, stop, BATCH) == pytest.approx(predicted, rel=0.1)
    assert profile.forward_s[-1] == (0.0, 0.0)
    slow = predict_host(course.model, (BATCH,), synthetic.reference_times(course.law, 5.0),
                        weights=synthetic.weights())  # fmt: skip
    quick = predict_host(course.model, (BATCH,), synthetic.reference_times(course.law),
                         weights=synthetic.weights())  # fmt: skip
    ratio = sum(row[0] for row in slow.backward_s) / sum(row[0] for row in quick.backward_s)
    assert ratio == pytest.approx(5.0, rel=0.1)
