"""The jit kernels give the bytes of the numpy references, and read them alike."""

from __future__ import annotations

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from comms import ChannelOptions, CodecError, Endpoint, Role, Tag, codec_names, parse_codec
from pipar_jax import codec_kernels

KERNELS = [name for name in codec_names() if name not in ("custom",)]
SHAPES = [(), (129,), (3, 5, 67)]


def values(shape, dtype, seed=0):
    rng = np.random.default_rng(seed)
    scales = 10.0 ** rng.integers(-5, 4, size=shape)
    return np.asarray(rng.normal(size=shape) * scales).astype(np.float32).astype(dtype)


def supported(name: str) -> bool:
    from comms.block_codec import BlockCodec
    from comms.cast_codec import CastCodec

    return name == "raw" or isinstance(parse_codec(name)[0], BlockCodec | CastCodec)


@pytest.mark.parametrize("name", [name for name in KERNELS if supported(name)])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16], ids=str)
def test_kernels_and_references_agree_byte_by_byte(name, dtype):
    dtype = np.dtype(dtype)
    for shape in SHAPES:
        text = name if parse_codec(name)[1] == 0 or shape == () else f"{name}:32"
        codec, parameter = parse_codec(text)
        array = values(shape, dtype)
        array = np.where(np.isfinite(array), array, 0).astype(dtype)
        expected = codec.encode(np.ascontiguousarray(array).reshape(shape), parameter)
        actual = np.asarray(codec_kernels.encoder(text)(jnp.asarray(array)))
        np.testing.assert_array_equal(actual, expected, err_msg=f"{text} {shape}")
        decoded = codec.decode(expected, dtype, shape, parameter)
        by_kernel = codec_kernels.decoder(text, dtype, shape)(jnp.asarray(expected))
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
    actual = np.asarray(codec_kernels.encoder(f"{name}:16")(jnp.asarray(array)))
    np.testing.assert_array_equal(actual[32:], expected[32:])
    decoded = codec.decode(expected, array.dtype, array.shape, parameter)
    assert np.isnan(decoded[:32]).all() and (decoded[32:48] == 0).all()
    by_kernel = codec_kernels.decoder(f"{name}:16", array.dtype, array.shape)(jnp.asarray(actual))
    np.testing.assert_array_equal(np.asarray(by_kernel), decoded)


def test_integers_are_refused():
    with pytest.raises(CodecError, match="not int32"):
        codec_kernels.encode(jnp.arange(4), "int8")


def test_a_tensor_coded_on_the_device_crosses_a_link_and_is_decoded_on_the_device():
    import queue

    array = jnp.asarray(values((64, 300), np.float32))
    options = ChannelOptions(deadline_s=5.0)
    links: queue.Queue = queue.Queue()
    messages: queue.Queue = queue.Queue()
    with Endpoint("server", options=options) as server, Endpoint("device") as client:
        _, port = server.listen("127.0.0.1", 0, links.put)
        up = client.connect("127.0.0.1", port, name_of_peer="server", timeout_s=5)
        links.get(timeout=5).start(messages.put, lambda: None, lambda error: None)
        up.send(Tag(role=Role.ACTIVATION), codec_kernels.encode_for_link(array, "int8:64"))
        message = messages.get(timeout=5)
        received = codec_kernels.decode_from_link(message.payload)
        np.testing.assert_array_equal(np.asarray(received), message.array)
        assert message.nbytes < array.nbytes / 3.7
        message.release()
