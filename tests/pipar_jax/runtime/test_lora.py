"""Split fine-tuning of a decoder by adapters: who trains what, what travels, and that it learns."""

from __future__ import annotations

import numpy as np
import pytest
from safetensors.numpy import save_file

from pipar_jax.config import Config, LoraConfig
from pipar_jax.errors import ConfigError, RunError
from pipar_jax.launch.api import run_here, train
from pipar_jax.launch.finished_run import load
from pipar_jax.methods.resolution import resolve
from pipar_jax.roles.start_weights import start_weights
from pipar_jax.runtime.setup import build_model
from pipar_jax.schedule.actions import ActionKind
from stages.signature import ArrayType, Signature
from tests.pipar_jax.runtime import support
from tests.stages import test_gpt2

SAMPLES, ROUNDS = (8, 8), 6
ARGS = " ".join(f"{name}={value}" for name, value in test_gpt2.SIZE.items())
#: Method, further fields, and the cuts of the two devices.
WAYS = {
    "fl": ({}, ((), ())),
    "pipar": ({"pipeline.cut": 1}, ((1,), (2,))),
    "mpsl": ({"pipeline.cuts": "1,3", "nodes.count": 1}, ((1, 3), (1, 3))),
}


def text(samples: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A language whose next token follows from the one before, and the tokens one later."""
    rng = np.random.default_rng(seed)
    rows = [rng.integers(0, test_gpt2.VOCABULARY, samples)]
    for _ in range(test_gpt2.LENGTH):
        rows.append((5 * rows[-1] + 3) % test_gpt2.VOCABULARY)
    both = np.stack(rows, 1).astype(np.int32)
    return both[:, :-1], both[:, 1:]


def setting(folder, method: str, base):
    made = support.config(folder, SAMPLES, name="gpt2", dtype="float32", method=method, batch=4)
    made.model.args, made.model.base, made.data.classes = ARGS, str(base), test_gpt2.VOCABULARY
    made.lora.match, made.lora.rank, made.lora.alpha = r"attention/|widen|narrow", 4, 8.0
    made.epochs, made.run.evaluate_every = ROUNDS // 2, 1
    made.optimizer.learning_rate, made.pipeline.micro_batches = 0.5, 2
    made.data.source = f"npz:{base.parent}/shard-{{device}}.npz"
    made.data.test_source, made.data.normalise = f"npz:{base.parent}/test.npz", "none"
    made.task.name = "language"
    for path, value in WAYS[method][0].items():
        group, _, name = path.partition(".")
        setattr(getattr(made, group), name, value)
    if method == "pipar":
        made.devices.overrides = {1: {"cut": 2}}
    return made


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Weights as Hugging Face writes them, with its prefix and a buffer that is no weight."""
    path = tmp_path_factory.mktemp("base") / "model.safetensors"
    file = test_gpt2.file_of(np.random.default_rng(0), prefix="transformer.")
    save_file({**file, "transformer.h.0.attn.bias": np.ones((1, 1, 12, 12), np.float32)}, path)
    for name, part, samples, seed in (
        ("shard-0", "train", SAMPLES[0], 0), ("shard-1", "train", SAMPLES[1], 1),
        ("test", "test", 8, 9),
    ):  # fmt: skip
        x, y = text(samples, seed)
        np.savez(path.parent / f"{name}.npz", **{f"x_{part}": x, f"y_{part}": y})
    return path


@pytest.fixture(scope="module")
def runs(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")

    def run(method):
        resolved = resolve(setting(folder / method, method, base))
        return load(run_here(resolved, on_event=lambda event: None))

    return {method: run(method) for method in WAYS}


def test_the_base_stays_and_the_adapters_are_the_same_by_every_method(runs, base):
    signature = Signature(
        ArrayType((test_gpt2.LENGTH,), "int32"), {},
        {"y": ArrayType((test_gpt2.LENGTH,), "int32")}, test_gpt2.VOCABULARY,
    )  # fmt: skip
    start = build_model(resolve(setting(base.parent, "pipar", base)), signature)
    whole = start.completed(start.init(0)[0])
    for method, run in runs.items():
        for unit, arrays in run.params.items():
            for path, array in arrays.items():
                if "/lora/" in path:
                    assert np.any(np.asarray(array) != whole[unit][path]), (method, unit, path)
                    np.testing.assert_allclose(array, runs["fl"].params[unit][path], atol=2e-4)
                else:
                    np.testing.assert_array_equal(array, whole[unit][path])


@pytest.mark.sampled(2)
@pytest.mark.parametrize("method", ["pipar", "mpsl"])
def test_perplexity_falls(method, base, tmp_path):
    made = setting(tmp_path, method, base)
    made.optimizer.name, made.optimizer.learning_rate, made.epochs = "adam", 0.02, 20
    made.aggregation.every = "epoch"
    run = load(run_here(resolve(made), on_event=lambda event: None))
    perplexities = [
        row["metrics"]["perplexity"] for row in run.metrics if row["event"] == "evaluated"
    ]
    assert perplexities[-1] < 0.8 * perplexities[0]


def test_only_adapters_travel(runs):
    """Each round every device sends what its adapters take, and nothing of the base."""
    for method, run in runs.items():
        held = {
            unit: sum(np.asarray(a).nbytes for path, a in arrays.items() if "/lora/" in path)
            for unit, arrays in run.params.items()
        }
        names = list(held)
        expected = 0
        for cuts in WAYS[method][1]:
            own = names if not cuts else names[: cuts[0]] + (names[cuts[1] :] if cuts[1:] else [])
            expected += sum(held[unit] for unit in own)
        sent = sum(
            row.nbytes
            for _, row in run.trace().rows()
            if row.action.kind == ActionKind.SEND_WEIGHTS
        )
        tensors = sum(path.count("/lora/") for arrays in run.params.values() for path in arrays)
        headers = 256 * tensors * len(SAMPLES)  # at most; the base would take 30 kB more
        assert ROUNDS * expected < sent < ROUNDS * (expected + headers), method


def test_a_base_that_does_not_fit_is_refused_in_one_line(base, tmp_path):
    signature = Signature.labelled((test_gpt2.LENGTH,), test_gpt2.VOCABULARY, "int32")
    made = setting(tmp_path, "pipar", base)
    made.model.args = ARGS.replace("depth=2", "depth=3")
    with pytest.raises(RunError, match=r"has no weight block3/\S+ of model 'gpt2', which is not"):
        build_model(resolve(made), signature)
    made.model.args = ARGS.replace("width=16", "width=20")
    with pytest.raises(RunError, match=r"has the shape \[12, 16\], but embed/positions .* model"):
        build_model(resolve(made), signature)
    (tmp_path / "broken.safetensors").write_bytes(b"no")
    made.model.base = str(tmp_path / "broken.safetensors")
    with pytest.raises(RunError, match="cannot be read as weights"):
        build_model(resolve(made), signature)


def test_a_program_passes_tokens_whatever_data_source_says(runs, base, tmp_path):
    """Its default names images, which such a network would refuse."""
    made = setting(tmp_path, "pipar", base)
    made.data.source, made.data.test_source = Config().data.source, ""
    with pytest.raises(ConfigError, match="takes rows of tokens"):
        made.data.classes = 0
        train(made)
    made.data.classes = test_gpt2.VOCABULARY
    data = [text(SAMPLES[0], 0), text(SAMPLES[1], 1), text(8, 9)]
    run = train(made, data=data)
    for unit, arrays in runs["pipar"].params.items():
        for path, array in arrays.items():
            np.testing.assert_array_equal(run.params[unit][path], array)
    assert run.score() == runs["pipar"].score()


def test_all_weights_may_start_from_a_file_of_hugging_face(base, tmp_path):
    """As the server does by model.weights: the file is its own, and so need not be elsewhere."""
    made = setting(tmp_path, "pipar", base)
    tokens = ArrayType((test_gpt2.LENGTH,), "int32")
    signature = Signature(tokens, {}, {"y": tokens}, test_gpt2.VOCABULARY)
    based = build_model(resolve(made), signature)
    made.lora, made.model.base = LoraConfig(), ""
    model = build_model(resolve(made), signature)
    params, state = start_weights(base, "", model, *model.init(0))
    assert not any(state.values())
    wanted = based.completed(based.init(0)[0])
    for unit, arrays in params.items():
        for path, array in arrays.items():
            np.testing.assert_array_equal(array, wanted[unit][path])


def test_adapters_in_a_network_of_ones_own_are_the_users(tmp_path, base):
    made = setting(tmp_path, "pipar", base)
    made.model.name = "module:some:net"
    with pytest.raises(ConfigError, match=r"lora.match=.*use nnx.LoRA and set model.trainable"):
        resolve(made)
