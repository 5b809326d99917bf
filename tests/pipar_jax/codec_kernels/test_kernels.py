"""The jit kernels give the bytes of the numpy references, and read them alike."""

from __future__ import annotations

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from comms import (
    ChannelOptions,
    CodecError,
    Encoded,
    Endpoint,
    Payload,
    Role,
    Tag,
    codec_names,
    parse_codec,
)
from comms.codecs.block import BlockCodec
from comms.codecs.cast import CastCodec
from pipar_jax.codec_kernels import kernels
from tests.comms.conftest import admitting
from tests.patience import PATIENCE_S

BIT_CODECS = ("bits:1", "bits:8", "bits:23", "bits:6s17", "bits:abs0.01", "bits:rel1e-3",
              "bits:lossless")  # fmt: skip
KERNELS = [name for name in codec_names() if name not in ("custom",)]
SHAPES = [(), (129,), (3, 5, 67)]


def values(shape, dtype, seed=0):
    rng = np.random.default_rng(seed)
    scales = 10.0 ** rng.integers(-5, 4, size=shape)
    return np.asarray(rng.normal(size=shape) * scales).astype(np.float32).astype(dtype)


def supported(name: str) -> bool:
    return name == "raw" or isinstance(parse_codec(name)[0], BlockCodec | CastCodec)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", [name for name in KERNELS if supported(name)])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16], ids=str)
def test_kernels_and_references_agree_byte_by_byte(name, dtype):
    dtype = np.dtype(dtype)
    for shape in SHAPES:
        blocks = isinstance(parse_codec(name)[0], BlockCodec)
        text = f"{name}:32" if blocks and shape else name
        codec, parameter = parse_codec(text)
        array = values(shape, dtype)
        array = np.where(np.isfinite(array), array, 0).astype(dtype)
        expected = codec.encode(np.ascontiguousarray(array).reshape(shape), parameter)
        actual = kernels.to_host(kernels.encoder(text)(jnp.asarray(array)))
        np.testing.assert_array_equal(actual, expected, err_msg=f"{text} {shape}")
        decoded = codec.decode(expected, dtype, shape, parameter)
        by_kernel = kernels.decoder(text, dtype, shape)(jnp.asarray(expected))
        assert by_kernel.dtype == dtype and by_kernel.shape == shape
        assert np.asarray(by_kernel).tobytes() == decoded.tobytes()


@pytest.mark.parametrize("name", ["int8", "int4", "fp8", "fp8_e5m2"])
def test_kernels_and_references_agree_on_odd_values(name):
    array = np.zeros(8 * 16, np.float32)
    array[0:16] = [np.inf, *range(15)]
    array[16:32] = [np.nan, *range(15)]
    array[32:48] = 2.0**-110
    array[48:64] = np.finfo(np.float32).max
    array[64:80] = np.linspace(-1, 1, 16)
    array[80:96] = -0.0
    array[96:112] = np.arange(16) - 7.5
    codec, parameter = parse_codec(f"{name}:16")
    expected = codec.encode(array, parameter)
    actual = kernels.to_host(kernels.encoder(f"{name}:16")(jnp.asarray(array)))
    np.testing.assert_array_equal(actual[32:], expected[32:])
    decoded = codec.decode(expected, array.dtype, array.shape, parameter)
    assert np.isnan(decoded[:32]).all() and (decoded[32:48] == 0).all()
    by_kernel = kernels.decoder(f"{name}:16", array.dtype, array.shape)(jnp.asarray(actual))
    np.testing.assert_array_equal(np.asarray(by_kernel), decoded)


def odd_arrays() -> dict[str, np.ndarray]:
    """Arrays of one shape, so that each codec is compiled once for all of them."""
    rng = np.random.default_rng(4)
    plain = (rng.normal(size=1000) * 10.0 ** rng.integers(-3, 3, size=1000)).astype(np.float32)
    sparse = np.maximum(plain, 0)
    few = np.where(np.arange(1000) % 97 == 0, plain, 0).astype(np.float32)
    tiny = np.where(np.arange(1000) < 500, plain, 2.0**-140).astype(np.float32)
    huge = np.where(np.arange(1000) < 64, 3.4e38, -plain).astype(np.float32)
    broken = plain.copy()
    broken[[3, 700]] = np.inf, np.nan
    powers = (2.0 ** rng.integers(-30, 30, size=1000) * rng.choice([-1, 1, 1.99999], 1000)).astype(
        np.float32
    )
    return {
        "plain": plain, "sparse": sparse, "few": few, "tiny": tiny, "huge": huge,
        "broken": broken, "powers": powers, "zero": np.zeros(1000, np.float32),
        "minus zero": np.full(1000, -0.0, np.float32), "denormal": plain * np.float32(1e-41),
    }  # fmt: skip


def check_bit_kernels(text: str, arrays: dict[str, np.ndarray]) -> None:
    codec, parameter = parse_codec(text)
    for what, array in arrays.items():
        expected = codec.encode(array, parameter)
        coded = kernels.encoder(text)(jnp.asarray(array))
        np.testing.assert_array_equal(kernels.to_host(coded), expected, err_msg=what)
        most = codec.encoded_bytes(array.dtype, array.shape, parameter)
        assert coded.payload.size == most
        decode = kernels.decoder(text, array.dtype, array.shape)
        by_kernel = np.asarray(decode(kernels.to_device(expected, most)))
        decoded = codec.decode(expected, array.dtype, array.shape, parameter)
        assert by_kernel.dtype == array.dtype and by_kernel.shape == array.shape
        # As float32, of which numpy knows that a NaN equals a NaN.
        actual, desired = by_kernel.astype(np.float32), decoded.astype(np.float32)
        np.testing.assert_array_equal(actual, desired, err_msg=what)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("text", BIT_CODECS)
def test_the_bit_kernels_make_and_read_the_bytes_of_comms(text):
    check_bit_kernels(text, odd_arrays())


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("text", "dtype"),
    [("bits:3", ml_dtypes.bfloat16), ("bits:rel0.01", np.float16), ("bits:lossless", np.float16)],
)
def test_the_bit_kernels_take_narrow_types(text, dtype):
    arrays = odd_arrays()
    with np.errstate(over="ignore"):
        narrow = {what: arrays[what].astype(dtype) for what in ("plain", "few", "huge")}
    check_bit_kernels(text, narrow | {"one": np.ones((), dtype), "none": np.ones((0, 3), dtype)})


def test_a_payload_of_any_length_is_filled_up_on_the_device():
    for nbytes in (8, 100, 999, 1000):
        data = np.arange(nbytes, dtype=np.uint8)
        filled = np.asarray(kernels.to_device(data, 1000))
        assert filled.size == 1000
        np.testing.assert_array_equal(filled[:nbytes], data)
        assert not filled[nbytes:].any()


def test_a_broken_payload_is_refused_before_it_reaches_the_device():
    codec, parameter = parse_codec("bits:4")
    data = codec.encode(values((300,), np.float32), parameter)
    payload = Payload(data[:-8], codec, parameter, np.dtype(np.float32), (300,))
    with pytest.raises(CodecError, match="cannot be read"):
        kernels.decode_from_link(payload)


def test_integers_are_refused():
    with pytest.raises(CodecError, match="not int32"):
        kernels.encode(jnp.arange(4), "int8")


@pytest.mark.parametrize("name", ["int8:64", "bits:6"])
def test_a_tensor_coded_on_the_device_crosses_a_link_and_is_decoded_on_the_device(name):
    import queue

    array = jnp.asarray(values((64, 300), np.float32))
    options = ChannelOptions(deadline_s=5.0)
    links: queue.Queue = queue.Queue()
    messages: queue.Queue = queue.Queue()
    with Endpoint("server", options=options) as server, Endpoint("device") as client:
        _, port = server.listen("127.0.0.1", 0, admitting(links.put))
        up = client.connect("127.0.0.1", port, name_of_peer="server", timeout_s=PATIENCE_S)
        links.get(timeout=PATIENCE_S).start(messages.put, lambda: None, lambda error: None)
        payload = kernels.to_host(kernels.encoder(name)(array))
        coded = Encoded(name, payload, np.dtype(array.dtype), array.shape)
        up.send(Tag(role=Role.ACTIVATION), coded)
        message = messages.get(timeout=PATIENCE_S)
        received = kernels.decode_from_link(message.payload)
        np.testing.assert_array_equal(np.asarray(received), message.array)
        assert message.nbytes < array.nbytes / 3.7
        message.release()
