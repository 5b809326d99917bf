"""Training steps of pipar_jax and PyTorch, timed in processes of ``pipar_jax.launch.pinning``.

A step is forward, loss, backward and SGD with momentum on one batch of CIFAR shapes. Each process
prepares one network and runs it on request, so that two processes on the same cores can alternate.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from typing import Any

import numpy as np

import stages
from stages.allocator import retain_memory, return_memory

_STATE: dict[str, Any] = {}
LEARNING_RATE, MOMENTUM = 0.01, 0.9


def prepare_jax(
    name: str,
    batch: int,
    cuts: tuple[int, ...] = (),
    rematerialise: bool = False,
    stem: str = "cifar",
    traced: bool = False,
) -> dict[str, float]:
    """Builds and compiles a network of ours.

    Args:
      name: One of ``stages.MODELS``.
      batch: Samples per step.
      cuts: Its cuts; the stages run one after another in this process.
      rematerialise: Whether stages recompute their forward pass.
      stem: One of ``stages.STEMS``.
      traced: Whether the network is not the registered one, but the one of ``flax_networks``,
        traced.

    Returns:
      compile_s, and residual_bytes of all stages but the last.
    """
    retain_memory()
    import jax
    import optax

    model = _traced(name, stem) if traced else _registered(name, stem)
    parts = stages.split(model, cuts, rematerialise=rematerialise)
    params, state = model.init(0)
    tx = optax.sgd(LEARNING_RATE, MOMENTUM)
    update = stages.make_update(tx)
    x, y = _batch(batch)
    draw = stages.make_draw(batch)
    held = [stages.select(part, params) for part in parts]
    stats = [stages.select(part, state) for part in parts]
    opts = [stages.init_opt_state(own, tx) for own in held]
    images, labels = jax.device_put((x, y))

    def step() -> None:
        h, kept = images, []
        for i, part in enumerate(parts[:-1]):
            h, residuals, stats[i] = part.forward(held[i], stats[i], h, draw)
            kept.append(residuals)
        gradients: list[Any] = [None] * len(parts)
        _, cotangent, gradients[-1], stats[-1] = parts[-1].loss(
            held[-1], stats[-1], h, labels, draw, None
        )
        for i in reversed(range(len(parts) - 1)):
            assert cotangent is not None  # only the first stage has no cotangent
            cotangent, gradients[i] = parts[i].backward(held[i], kept.pop(), cotangent, None)
        for i in range(len(parts)):
            held[i], opts[i] = update(held[i], opts[i], gradients[i])
        jax.block_until_ready((held, stats))  # type: ignore[no-untyped-call]

    began = time.perf_counter()
    step()
    compile_s = time.perf_counter() - began
    return_memory()  # of compiling, as hosts do before they train
    facts = stages.stage_facts(model, cuts, batch, rematerialise=rematerialise)
    _STATE["step"] = step
    return {
        "compile_s": compile_s,
        "residual_bytes": float(sum(row.residual_bytes for row in facts[:-1])),
    }


def prepare_flax(name: str, batch: int, stem: str = "cifar") -> None:
    """Builds and compiles a network of ``flax_networks`` under a plain ``jax.jit``."""
    import jax
    import optax
    from flax import nnx

    from experiments.benchmarks import flax_networks

    model = flax_networks.build(name, stem, nnx.Rngs(0))
    divide: Any = nnx.split  # its type does not know of ...
    graph, params, stats = divide(model, nnx.Param, ...)
    tx = optax.sgd(LEARNING_RATE, MOMENTUM)
    images, labels = jax.device_put(_batch(batch))

    def mean_loss(params: Any, stats: Any) -> Any:
        module = nnx.merge(graph, params, stats, copy=True)
        logits = module(images)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean(), divide(module, nnx.Param, ...)[2]

    @jax.jit
    def train(params: Any, stats: Any, opt: Any) -> Any:
        gradient, stats = jax.grad(mean_loss, has_aux=True)(params, stats)
        updates, opt = tx.update(gradient, opt, params)
        return optax.apply_updates(params, updates), stats, opt

    held = [params, stats, tx.init(params)]

    def step() -> None:
        held[:] = jax.block_until_ready(train(*held))  # type: ignore[no-untyped-call]

    step()
    _STATE["step"] = step


def _registered(name: str, stem: str) -> stages.Model:
    return stages.build(name, input_shape=(32, 32, 3), classes=10, stem=stem)


def _traced(name: str, stem: str) -> stages.Model:
    import jax

    from experiments.benchmarks import flax_networks

    example = jax.ShapeDtypeStruct((1, 32, 32, 3), np.float32)  # type: ignore[no-untyped-call]
    return stages.trace(lambda rngs: flax_networks.build(name, stem, rngs), example, name=name)


def count_flops(name: str, batch: int, stem: str = "cifar") -> float:
    """Floating-point operations of our step, forward and backward."""
    model = _registered(name, stem)
    return sum(
        row.forward_flops + row.backward_flops for row in stages.stage_facts(model, (), batch)
    )


def measure_rate() -> float:
    """Floating-point operations per second of a large matrix product on this process's cores."""
    import jax

    side = 1536
    a = jax.random.normal(jax.random.key(0), (side, side))
    product = jax.jit(lambda a: a @ a)
    return 2.0 * side**3 / _least(lambda: product(a).block_until_ready(), 8)


def prepare_torch(
    name: str, batch: int, threads: int, channels_last: bool, stem: str = "cifar"
) -> int:
    """Builds a network in PyTorch and runs a step, which allocates what later steps find.

    Args:
      name: Network, as for ``experiments.benchmarks.torch_networks.build``.
      batch: Samples per step.
      threads: Number of threads that PyTorch may use.
      channels_last: Whether images and kernels have the layout channels last.
      stem: One of ``stages.STEMS``.

    Returns:
      The number of parameters.
    """
    from experiments.benchmarks import torch_networks

    torch = importlib.import_module("torch")
    torch.set_num_threads(threads)
    model = torch_networks.build(name, stem=stem)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    model = model.to(memory_format=layout)
    images, labels = _batch(batch)
    x = torch.from_numpy(images.transpose(0, 3, 1, 2).copy()).contiguous(memory_format=layout)
    y = torch.from_numpy(labels).long()
    optimiser = torch.optim.SGD(model.parameters(), LEARNING_RATE, momentum=MOMENTUM)
    cross_entropy = torch.nn.functional.cross_entropy

    def step() -> None:
        optimiser.zero_grad()
        cross_entropy(model(x), y).backward()
        optimiser.step()

    step()
    _STATE["step"] = step
    return sum(parameter.numel() for parameter in model.parameters())


def run_step(times: int) -> float:
    """Runs the prepared step and returns the minimum of the seconds of several runs."""
    return _least(_STATE["step"], times)


def _least(run: Callable[[], Any], times: int) -> float:
    """Minimum of the seconds of several runs."""
    least = float("inf")
    for _ in range(times):
        began = time.perf_counter()
        run()
        least = min(least, time.perf_counter() - began)
    return least


def _batch(size: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Random images [size, 32, 32, 3] float32 and labels [size] int32."""
    random = np.random.default_rng(0)
    x = random.normal(size=(size, 32, 32, 3)).astype(np.float32)
    return x, random.integers(0, 10, size).astype(np.int32)
