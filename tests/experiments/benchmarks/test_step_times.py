"""What `experiments.bench_stages` times: our steps, and PyTorch's networks beside them."""

from __future__ import annotations

import importlib.util
import sys
from unittest import mock

import pytest

import stages
from experiments.benchmarks import step_times, torch_networks
from stages.allocator import peak_bytes

TORCH = importlib.util.find_spec("torch") is not None
NETWORKS = (
    "vgg5",
    "vgg16",
    "resnet18",
    "resnet50",
    "resnet101",
    "mobilenetv3_small",
    "mobilenetv3_large",
)


def test_pytorch_has_run_a_step_before_one_is_timed(monkeypatch):
    """As ours has: in slow cells nothing else is run before."""
    torch = mock.MagicMock()
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setattr(torch_networks, "build", mock.MagicMock())
    step_times.prepare_torch("vgg5", 2, 1, channels_last=False)
    steps = torch.optim.SGD.return_value.step
    assert steps.call_count == 1
    step_times.run_step(2)
    assert steps.call_count == 3


def test_every_network_of_pytorch_is_one_of_ours():
    assert set(NETWORKS) <= set(torch_networks.NAMES) <= set(stages.MODELS)


@pytest.mark.skipif(not TORCH, reason="torch is not installed (extra `peers`)")
@pytest.mark.parametrize("stem", stages.STEMS)
@pytest.mark.parametrize("name", NETWORKS)
def test_torch_networks_have_the_same_number_of_parameters(name, stem):
    count = step_times.prepare_torch(name, 2, 1, channels_last=False, stem=stem)
    ours = stages.build(name, input_shape=(32, 32, 3), classes=10, stem=stem)
    assert count == stages.parameter_count(ours)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("rematerialise", [False, True])
def test_a_cut_step_is_prepared_and_timed(monkeypatch, rematerialise, quiet):
    # Allocator settings are for a process of its own.
    monkeypatch.setattr(step_times, "retain_memory", lambda: True)
    prepared = step_times.prepare_jax("vgg5", 2, (3,), rematerialise)
    assert prepared["compile_s"] > 0
    kept = prepared["residual_bytes"]
    images = 2 * 32 * 32 * 3 * 4
    assert (kept == images) if rematerialise else (kept > 5 * images)
    step_s = step_times.run_step(2)
    assert step_s > 0 and (not quiet or step_s < prepared["compile_s"])


def test_operations_rate_and_memory_are_plausible():
    # Three passes of about 17 million multiplications and additions per sample.
    assert 60e6 < step_times.count_flops("vgg5", 2) < 200e6
    assert step_times.measure_rate() > 1e8
    assert peak_bytes() > 50e6
