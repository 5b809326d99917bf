"""GPT-2's architecture, against a small reference in numpy, and against PyTorch's where it is."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import stages
from stages.models.gpt2 import find_weight, hugging_face_name
from stages.names import ARGUMENTS, units_of
from tests.stages import support

SIZE = {"width": 16, "heads": 4, "depth": 2, "positions": 12}
VOCABULARY, LENGTH = 29, 9
LAYERS = r"attention/|widen|narrow"


def build(lora=None, **values) -> stages.Model:
    return stages.build("gpt2", input_shape=(LENGTH,), classes=VOCABULARY, arguments=SIZE,
                        lora=lora, **values)  # fmt: skip


def file_of(rng: np.random.Generator, *, prefix: str = "", tied: bool = True):
    """Random weights in the layout of Hugging Face, whose dense layers are [in, out]."""
    width = SIZE["width"]
    shapes: dict[str, tuple[int, ...]] = {
        "wte.weight": (VOCABULARY, width), "wpe.weight": (SIZE["positions"], width),
        "ln_f.weight": (width,), "ln_f.bias": (width,),
    }  # fmt: skip
    for i in range(SIZE["depth"]):
        shapes |= {
            f"h.{i}.ln_1.weight": (width,), f"h.{i}.ln_1.bias": (width,),
            f"h.{i}.attn.c_attn.weight": (width, 3 * width),
            f"h.{i}.attn.c_attn.bias": (3 * width,),
            f"h.{i}.attn.c_proj.weight": (width, width), f"h.{i}.attn.c_proj.bias": (width,),
            f"h.{i}.ln_2.weight": (width,), f"h.{i}.ln_2.bias": (width,),
            f"h.{i}.mlp.c_fc.weight": (width, 4 * width), f"h.{i}.mlp.c_fc.bias": (4 * width,),
            f"h.{i}.mlp.c_proj.weight": (4 * width, width), f"h.{i}.mlp.c_proj.bias": (width,),
        }  # fmt: skip
    made = {
        prefix + name: 0.3 * rng.normal(size=shape).astype(np.float32)
        for name, shape in shapes.items()
    }
    if not tied:
        made["lm_head.weight"] = rng.normal(size=(VOCABULARY, width)).astype(np.float32)
    return made


def loaded(model: stages.Model, file):
    """The model's weights from a file."""
    params, state = model.init(0)
    for unit, arrays in params.items():
        for path in arrays:
            array, transposed = find_weight(file, unit, path)
            arrays[path] = jnp.asarray(array.T if transposed else array)
    return params, state


def reference(file, tokens):
    """GPT-2 as its paper and its code write it: one sample after another, no batch, no jax."""

    def norm(x, name):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return x * file[f"{name}.weight"] + file[f"{name}.bias"]

    def dense(x, name):
        return x @ file[f"{name}.weight"] + file[f"{name}.bias"]

    def gelu(x):
        return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))

    def softmax(x):
        x = np.exp(x - x.max(-1, keepdims=True))
        return x / x.sum(-1, keepdims=True)

    rows = []
    for row in tokens:
        x = file["wte.weight"][row] + file["wpe.weight"][: len(row)]
        for i in range(SIZE["depth"]):
            parts = np.split(dense(norm(x, f"h.{i}.ln_1"), f"h.{i}.attn.c_attn"), 3, -1)
            q, k, v = (np.stack(np.split(part, SIZE["heads"], -1)) for part in parts)
            scores = q @ k.transpose(0, 2, 1) / np.sqrt(q.shape[-1])
            scores[:, ~np.tri(len(row), dtype=bool)] = -np.inf
            mixed = np.concatenate(list(softmax(scores) @ v), -1)
            x = x + dense(mixed, f"h.{i}.attn.c_proj")
            wide = gelu(dense(norm(x, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc"))
            x = x + dense(wide, f"h.{i}.mlp.c_proj")
        head = file.get("lm_head.weight", file["wte.weight"])
        rows.append(norm(x, "ln_f") @ head.T)
    return np.stack(rows)


def tokens(samples: int = 5) -> np.ndarray:
    drawn = np.random.default_rng(1).integers(0, VOCABULARY, (samples, LENGTH))
    return drawn.astype(np.int32)


@pytest.mark.parametrize("tied", [True, False])
def test_it_is_the_reference(tied):
    file = file_of(np.random.default_rng(0), tied=tied)
    wide = {name: array.astype(np.float64) for name, array in file.items()}
    params, state = loaded(model := build(), file)
    logits = stages.predict(model, params, state, jnp.asarray(tokens()))
    np.testing.assert_allclose(logits, reference(wide, tokens()), atol=1e-4)


def test_it_is_the_model_of_transformers():
    """With random weights of its own; needs torch and transformers."""
    torch = pytest.importorskip("torch", reason="the extra peers is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_positions=SIZE["positions"], n_embd=SIZE["width"],
        n_layer=SIZE["depth"], n_head=SIZE["heads"],
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(config).eval()
    file = {name: array.numpy() for name, array in theirs.state_dict().items()}
    params, state = loaded(model := build(), file)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(tokens().astype(np.int64))).logits.numpy()
    logits = stages.predict(model, params, state, jnp.asarray(tokens()))
    np.testing.assert_allclose(logits, expected, atol=1e-4)


def test_every_weight_has_a_name_in_the_file_and_every_name_is_used():
    model, file = build(), file_of(np.random.default_rng(0), tied=False)
    names = [hugging_face_name(u.name, path)[0] for u in model.units for path in u.weights]
    assert sorted(names) == sorted(file)
    assert find_weight({"transformer.wte.weight": 1}, "head", "dense/kernel") == (1, True)
    assert find_weight(file, "block1", "attention/inward/lora/a") is None


def test_the_default_is_gpt2_small():
    model = stages.build("gpt2", input_shape=(1024,), classes=50257)
    own = sum(leaf.size for leaf in model.units[-1].params.values()) - 2 * 768  # a copy
    assert stages.parameter_count(model) - own == 124_439_808  # as its authors count
    assert model.unit_names == units_of("gpt2", {}) and ARGUMENTS["gpt2"]["depth"] == 12


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"depht": 2}, "has no argument 'depht'"),
        ({"depth": 0}, "depth=0 is not a number of at least 1"),
        ({"width": 10, "heads": 4}, "width=10 is not divisible by heads=4"),
        ({"positions": 4}, r"samples of 9 tokens are longer than positions=4"),
    ],
)
def test_sizes_that_cannot_be_are_refused(arguments, says):
    with pytest.raises(stages.StageError, match=says):
        stages.build("gpt2", input_shape=(LENGTH,), classes=VOCABULARY,
                     arguments={**SIZE, **arguments})  # fmt: skip


# --- adapters ---------------------------------------------------------------------------------


def stirred(model: stages.Model):
    """Weights whose adapters are not zero, of a model with all weights trained."""
    params, state = model.init(3)
    rng = np.random.default_rng(5)
    return jax.tree.map(lambda w: w + jnp.asarray(0.1 * rng.normal(size=w.shape), w.dtype),
                        params), state  # fmt: skip


def test_adapters_begin_as_the_network_without_them():
    plain, adapted = build(), build(lora=(LAYERS, 3, 6.0))
    for unit, arrays in plain.init(3)[0].items():
        for path, array in arrays.items():
            np.testing.assert_array_equal(array, adapted.init(3)[0][unit][path])
    x = jnp.asarray(tokens())
    np.testing.assert_array_equal(
        stages.predict(plain, *plain.init(3), x), stages.predict(adapted, *adapted.init(3), x)
    )


def test_adapters_are_the_formula_of_the_paper():
    """W + alpha / rank A B in place of W."""
    adapted, plain = build(lora=(LAYERS, 3, 6.0)), build()
    params, state = stirred(adapted)
    merged: dict = {}
    for unit, arrays in params.items():
        merged[unit] = {path: array for path, array in arrays.items() if "/lora/" not in path}
        for layer in {path.removesuffix("/lora/a") for path in arrays if path.endswith("/lora/a")}:
            product = arrays[f"{layer}/lora/a"] @ arrays[f"{layer}/lora/b"]
            merged[unit][f"{layer}/kernel"] += 2.0 * product
    x = jnp.asarray(tokens())
    np.testing.assert_allclose(
        stages.predict(adapted, params, state, x), stages.predict(plain, merged, state, x),
        atol=1e-4,
    )  # fmt: skip


@pytest.mark.sampled(3)
@pytest.mark.parametrize("cuts", [(1,), (2, 3)])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_split_fine_tuning_has_the_gradients_of_the_whole_network(cuts, micro_batches):
    """On a device and a server, and in a U-shape: the same for the adapters at each cut."""
    whole = build(lora=(LAYERS, 2, 4.0))
    some = whole.training("/lora/", seed=3)
    # Adapters alone are given: what is frozen comes from the seed.
    params, state = stirred(some)
    complete = some.completed(params)
    x = jnp.asarray(tokens(6))
    y = jnp.roll(x, -1, axis=1)
    _, wanted, _ = support.step(whole, (), complete, state, x, y)
    _, sums, _ = support.step(some, cuts, params, state, x, y, micro_batches)
    for unit, arrays in sums.items():
        assert all("/lora/" in path for path in arrays)
        for path, array in arrays.items():
            np.testing.assert_allclose(array, wanted[unit][path], atol=1e-6, rtol=1e-4)


def test_layers_that_match_nothing_are_refused():
    with pytest.raises(stages.StageError, match=r"lora.match='convs' matches none .*block1/att"):
        build(lora=("convs", 2, 4.0))
