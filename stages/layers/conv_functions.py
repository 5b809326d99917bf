"""Dense convolution in several exact formulations, chosen pass by pass.

A convolution has three passes: forward, the cotangent of its input, the gradient of its
kernel. Each can be XLA's own convolution or a matrix product over patches of the image, and
which is faster depends on the shape and the platform; ``stages.layers.formulation`` decides.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from stages.layers.formulation import Formulation, LayerShape, choose
from stages.trees import PyTree

DIMENSIONS = ("NHWC", "HWIO", "NHWC")
# Patches are made for as many samples at a time as fit into this (about a core's L2 cache), so that
# they stay in the cache and the memory of a step does not grow ninefold.
PATCH_BYTES = 2_500_000


class Geometry(NamedTuple):
    """Static description of a square convolution.

    Attributes:
      size: Height and width of the kernel.
      stride: Step in both directions.
      padding: Zeros added on each side.
      more: Zeros added to these after the last row and the last column, as Flax does where a
        stride leaves an odd number of them.
    """

    size: int
    stride: int
    padding: int
    more: int = 0

    @property
    def pointwise(self) -> bool:
        """Whether the kernel has one pixel: patches are then the image itself."""
        return self.size == 1 and self.padding == self.more == 0

    @property
    def edges(self) -> tuple[int, int]:
        """Zeros added before and after an axis."""
        return self.padding, self.padding + self.more

    def out(self, length: int) -> int:
        """Length of the output along an axis of ``length``."""
        return (length + sum(self.edges) - self.size) // self.stride + 1

    def reached(self, length: int) -> range:
        """Rows of the kernel that meet any of ``length`` rows, all others meet padding alone."""
        first = self.padding - (self.out(length) - 1) * self.stride
        return range(max(0, first), min(self.size, self.padding + length))

    def met(self, remainder: int, length: int, rows: int) -> list[tuple[int, int]]:
        """Returns what the input rows of index ≡ ``remainder`` (mod stride) are multiplied with.

        Args:
          remainder: See above.
          length: Number of these rows of the input.
          rows: Rows of the output.

        Returns:
          Pairs of a row of the output, counted from the row's index divided by the stride, and
          the kernel's row between them, without those that meet no row of the output.
        """
        first, row = divmod(remainder + self.padding, self.stride)
        pairs = [(first - n, place) for n, place in enumerate(range(row, self.size, self.stride))]
        return [pair for pair in pairs if -length < pair[0] < rows]

    def spread(self, cotangent: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """Dilates and pads an output's cotangent for a convolution without stride.

        Zeros between the rows undo the stride; those around undo the padding.

        Args:
          cotangent: [batch, height', width', channels].
          shape: LayerShape of the convolution's input.
        """
        edges = []
        for length, out in zip(shape[1:3], cotangent.shape[1:3], strict=True):
            low = self.size - 1 - self.padding
            taken = (out - 1) * self.stride + 1
            edges.append((low, length + self.size - 1 - low - taken, self.stride - 1))
        zero = jnp.zeros((), cotangent.dtype)
        return lax.pad(cotangent, zero, ((0, 0, 0), *edges, (0, 0, 0)))


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def convolve(x: jax.Array, kernel: jax.Array, geometry: Geometry) -> jax.Array:
    """Convolves images.

    Args:
      x: [batch, height, width, in].
      kernel: [size, size, in, out], dtype of x.
      geometry: Stride and padding.

    Returns:
      [batch, height', width', out], dtype of x.
    """
    key = _key(x.shape, kernel.shape, geometry)
    if choose("conv_forward", key) is Formulation.PATCHES:
        return _patches_forward(x, kernel, geometry)
    return xla_convolve(x, kernel, geometry)


def xla_convolve(x: jax.Array, kernel: jax.Array, geometry: Geometry, groups: int = 1) -> jax.Array:
    """XLA's own convolution; arguments as for ``convolve``."""
    y: jax.Array = lax.conv_general_dilated(
        x,
        kernel,
        (geometry.stride, geometry.stride),
        (geometry.edges, geometry.edges),
        dimension_numbers=DIMENSIONS,
        feature_group_count=groups,
    )
    return y


def _convolve_forward(x: jax.Array, kernel: jax.Array, geometry: Geometry) -> Any:
    return convolve(x, kernel, geometry), (x, kernel)


def _convolve_backward(geometry: Geometry, kept: PyTree, cotangent: jax.Array) -> Any:
    x, kernel = kept
    x, cotangent = written_out(x), written_out(cotangent)
    key = _key(x.shape, kernel.shape, geometry)
    if choose("conv_input", key) is Formulation.PATCHES:
        x_cotangent = patches_input(x.shape, kernel, geometry, cotangent)
    else:
        _, pull_input = jax.vjp(lambda x: xla_convolve(x, kernel, geometry), x)
        (x_cotangent,) = pull_input(cotangent)
    if choose("conv_kernel", key) is Formulation.PATCHES:
        gradient = patches_kernel(x, kernel.shape, geometry, cotangent)
    else:
        _, pull_kernel = jax.vjp(lambda kernel: xla_convolve(x, kernel, geometry), kernel)
        (gradient,) = pull_kernel(cotangent)
    return x_cotangent, gradient


convolve.defvjp(_convolve_forward, _convolve_backward)


def _key(x: tuple[int, ...], kernel: tuple[int, ...], geometry: Geometry) -> LayerShape:
    """The convolution's shape as ``formulation`` wants it."""
    batch, height, width, features = x
    return LayerShape(batch, height, width, features, kernel[-1], *geometry[:3])


def pad_images(x: jax.Array, geometry: Geometry, axis: int) -> jax.Array:
    """Pads the two axes from ``axis`` with the convolution's zeros."""
    pads = [(0, 0)] * x.ndim
    pads[axis] = pads[axis + 1] = geometry.edges
    return jnp.pad(x, pads) if any(geometry.edges) else x


def shifted(
    x: jax.Array,
    geometry: Geometry,
    axis: int,
    rows: int,
    columns: int,
    tall: range | None = None,
    wide: range | None = None,
) -> list[Any]:
    """For each position in the kernel the pixels it meets: slices of padded images.

    Args:
      x: Images, whose rows are axis ``axis`` and whose columns the next.
      geometry: The kernel's.
      axis: See x.
      rows: Rows of the output.
      columns: Columns of the output.
      tall: Rows of the kernel; all, if left out.
      wide: Columns of the kernel; all, if left out.
    """
    step, every = geometry.stride, range(geometry.size)
    shifts = []
    for i in every if tall is None else tall:
        for j in every if wide is None else wide:
            index = [slice(None)] * x.ndim
            index[axis] = slice(i, i + (rows - 1) * step + 1, step)
            index[axis + 1] = slice(j, j + (columns - 1) * step + 1, step)
            shifts.append(x[tuple(index)])
    return shifts


def samples_together(batch: int, bytes_per_sample: int, result_bytes: int = 0) -> int:
    """Returns the number of samples whose patches are made at a time.

    As many as fit into ``PATCH_BYTES``, or into the size of the result if that is larger;
    preferably a divisor of the batch, since a remainder is compiled separately.
    """
    fits = max(1, max(PATCH_BYTES, result_bytes) // bytes_per_sample)
    if fits >= batch:
        return batch
    even = max(n for n in range(1, fits + 1) if batch % n == 0)
    return even if 2 * even >= fits else fits


def _patches_forward(x: jax.Array, kernel: jax.Array, geometry: Geometry) -> jax.Array:
    """Patches times the kernel as a matrix, [batch x pixels, size x size x in]."""
    if geometry.pointwise:
        return _met(x, geometry) @ kernel[0, 0]
    features, out = kernel.shape[2:]
    rows, columns = geometry.out(x.shape[1]), geometry.out(x.shape[2])
    tall, wide = geometry.reached(x.shape[1]), geometry.reached(x.shape[2])
    places = len(tall) * len(wide)
    used = kernel[tall.start : tall.stop, wide.start : wide.stop]
    matrix = used.reshape(places * features, out)

    def product(images: jax.Array) -> jax.Array:
        shifts = shifted(pad_images(images, geometry, 1), geometry, 1, rows, columns, tall, wide)
        made = jnp.concatenate(shifts, -1).reshape(-1, places * features) @ matrix
        return made.reshape(-1, rows, columns, out)

    per_sample = rows * columns * places * features * x.dtype.itemsize
    return _in_runs(product, x, per_sample)


def _in_runs(
    product: Callable[[jax.Array], jax.Array], x: jax.Array, bytes_per_sample: int
) -> jax.Array:
    """Applies a product of patches to [batch, ...], as many samples at a time as fit the cache."""
    runs, rest = cut_batch(x, samples_together(x.shape[0], bytes_per_sample))
    y = lax.map(product, runs)
    y = y.reshape(-1, *y.shape[2:])
    return jnp.concatenate((y, product(rest))) if len(rest) else y


def patches_input(
    shape: tuple[int, ...], kernel: jax.Array, geometry: Geometry, cotangent: jax.Array
) -> jax.Array:
    """Patches of the cotangent times the kernel, [batch, height, width, in].

    A row of the image meets only every stride-th row of the kernel, which ones depends on the
    row's remainder. Rows of one remainder, and columns, are computed together: no product is
    spent on the zeros that a stride would put between the cotangent's pixels.
    """
    if geometry.pointwise:
        return geometry.spread(cotangent @ kernel[0, 0].T, shape)
    _, height, width, features = shape
    step, out = geometry.stride, kernel.shape[-1]
    rows, columns = cotangent.shape[1:3]
    tall, wide = -(-height // step), -(-width // step)
    remainders = [(i, j) for i in range(step) for j in range(step)]
    met = {
        (i, j): [
            (*row, *column)
            for row in geometry.met(i, tall, rows)
            for column in geometry.met(j, wide, columns)
        ]
        for i, j in remainders
    }
    turned = kernel.transpose(0, 1, 3, 2)
    matrices = {
        place: turned[
            pairs[0][1] : pairs[-1][1] + 1 : step, pairs[0][3] : pairs[-1][3] + 1 : step
        ].reshape(-1, features)
        for place, pairs in met.items()
        if pairs
    }
    # Rows that pixels at the edges meet beyond the cotangent's own.
    low = -(-geometry.size // step) - 1
    furthest = (step - 1 + geometry.padding) // step
    edges = [
        (low, max(0, furthest + length - own)) for length, own in ((tall, rows), (wide, columns))
    ]

    def product(cotangent: jax.Array) -> jax.Array:
        padded = jnp.pad(cotangent, ((0, 0), *edges, (0, 0)))
        parts = []
        for place in remainders:
            if place not in matrices:
                parts.append(jnp.zeros((len(padded), tall, wide, features), padded.dtype))
                continue
            pieces = [
                padded[:, low + a : low + a + tall, low + b : low + b + wide]
                for a, _, b, _ in met[place]
            ]
            made = jnp.concatenate(pieces, -1).reshape(-1, len(pieces) * out) @ matrices[place]
            parts.append(made.reshape(-1, tall, wide, features))
        if step == 1:
            return parts[0]
        grid = jnp.stack(parts).reshape(step, step, -1, tall, wide, features)
        laid = grid.transpose(2, 3, 0, 4, 1, 5).reshape(-1, tall * step, wide * step, features)
        return laid[:, :height, :width]

    largest = max(map(len, met.values()))
    per_sample = tall * wide * largest * out * cotangent.dtype.itemsize
    return _in_runs(product, cotangent, per_sample)


def written_out(x: jax.Array) -> jax.Array:
    """Returns x, and on CPUs keeps XLA from computing what x comes from again in each of its uses.

    Cheap layers are otherwise fused into the slow transposes of kernel gradients, and computed
    there once more and out of order: a quarter of VGG-5's step, two fifths of ResNet-101's. An
    optimisation barrier is taken away before XLA fuses; nothing is fused across a condition that
    only the data decide.
    """
    if jax.default_backend() != "cpu":
        return x
    never = x[(0,) * x.ndim] > jnp.inf
    held: jax.Array = lax.cond(never, jnp.negative, lambda x: x, x)
    return held


def patches_kernel(
    x: jax.Array, shape: tuple[int, ...], geometry: Geometry, cotangent: jax.Array
) -> jax.Array:
    """Patches of the channels-first image times the cotangent, summed over runs of samples.

    With channels first a shifted image is a slice with long rows, and the product's contracted
    axis (batch x pixels) is the left operand's last one, as fast matrix products want it.
    """
    if geometry.pointwise:
        pixels = ((0, 1, 2), (0, 1, 2))
        met = _met(x, geometry)
        return lax.dot_general(met, cotangent, (pixels, ((), ()))).reshape(shape)
    size, _, features, out = shape
    _, rows, columns, _ = cotangent.shape
    tall, wide = geometry.reached(x.shape[1]), geometry.reached(x.shape[2])
    places = len(tall) * len(wide)

    wide_dtype = jnp.promote_types(x.dtype, jnp.float32)  # 16 bits would round once a run

    def product(images: jax.Array, cotangent: jax.Array) -> jax.Array:
        padded = pad_images(images.transpose(3, 0, 1, 2), geometry, 2)
        patches = jnp.stack(shifted(padded, geometry, 2, rows, columns, tall, wide))
        return jnp.matmul(
            patches.reshape(places * features, -1), cotangent.reshape(-1, out),
            preferred_element_type=wide_dtype,
        )  # fmt: skip

    per_sample = rows * columns * places * features * x.dtype.itemsize
    result_bytes = places * features * out * x.dtype.itemsize
    together = samples_together(x.shape[0], per_sample, result_bytes)
    (images, last_images), (cotangents, last) = (cut_batch(v, together) for v in (x, cotangent))
    nothing = jnp.zeros((places * features, out), wide_dtype)
    total = product(last_images, last) if len(last) else nothing
    runs = (images, cotangents)
    total, _ = lax.scan(lambda total, run: (total + product(*run), None), total, runs)
    met = total.reshape(len(tall), len(wide), features, out).astype(x.dtype)
    around = [(rows.start, size - rows.stop) for rows in (tall, wide)]
    return jnp.pad(met, (*around, (0, 0), (0, 0)))


def _met(x: jax.Array, geometry: Geometry) -> jax.Array:
    """The pixels of an image that a pointwise convolution meets."""
    return x[:, :: geometry.stride, :: geometry.stride]


def cut_batch(x: jax.Array, together: int) -> tuple[jax.Array, jax.Array]:
    """Cuts a batch into runs of so many samples, [runs, together, ...], and the rest.

    They are worked through in a loop, not written out one after another: the loop uses the same
    memory for each run's patches, which stays in the cache.
    """
    runs = len(x) // together
    whole = x[: runs * together]
    return whole.reshape(runs, together, *x.shape[1:]), x[runs * together :]
