"""Every registered codec: round trips, errors within bounds, sizes told beforehand."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from comms import (
    CodecError,
    Encoded,
    Role,
    Tag,
    codec_names,
    decoded,
    encoded,
    parse_codec,
    register,
)
from comms.codecs.cast import FLOATS

LOSSY = [name for name in codec_names() if name != "raw"]
# Largest error of an element as a share of the largest magnitude in its block, or of itself.
BLOCK_ERROR = {"int8": 0.5 / 127, "int4": 0.5 / 7, "fp8": 1 / 16, "fp8_e5m2": 1 / 8}
OWN_ERROR = {"bfloat16": 2.0**-8, "float16": 2.0**-11}


def arrays(dtypes=FLOATS):
    """Finite arrays of any of the types and any shape, contiguous or not."""

    def of(dtype):
        numbers = st.floats(-60000, 60000, width=32, allow_subnormal=False)
        shapes = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=40)
        plain = hnp.arrays(np.float32, shapes, elements=numbers, fill=numbers)
        return plain.map(lambda array: array.astype(dtype))

    return st.sampled_from(sorted(dtypes, key=str)).flatmap(of)


@pytest.mark.parametrize("name", codec_names())
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_array_comes_back_with_its_type_and_shape_within_the_error(name, data):
    array = data.draw(arrays())
    codec, parameter = parse_codec(name)
    if name in BLOCK_ERROR:
        parameter = data.draw(st.sampled_from([8, 16, 128, 65536]))
    payload = codec.encode(np.array(array, order="C"), parameter)
    expected = codec.encoded_bytes(array.dtype, array.shape, parameter)
    assert payload.dtype == np.uint8 and payload.ndim == 1
    assert payload.nbytes == expected if codec.exact_size else payload.nbytes <= expected
    decoded = codec.decode(payload, array.dtype, array.shape, parameter)
    assert decoded.dtype == array.dtype and decoded.shape == array.shape
    with np.errstate(invalid="ignore"):  # a signalling NaN is quietened by the cast
        before, after = array.astype(np.float64).reshape(-1), decoded.astype(np.float64).reshape(-1)
    own = {np.dtype(np.float16): 2.0**-10, np.dtype(ml_dtypes.bfloat16): 2.0**-7}
    slack = own.get(array.dtype, 2.0**-22)
    if name in BLOCK_ERROR:
        for start in range(0, before.size, parameter):
            block = slice(start, start + parameter)
            top = np.abs(before[block]).max()
            error = np.abs(before[block] - after[block]).max()
            tiny = 2.0**-24 if array.dtype == np.float16 else 2.0**-100
            assert error <= top * (BLOCK_ERROR[name] + slack) * 1.001 + tiny
    elif name in OWN_ERROR:
        tiny = 2.0**-24 if name == "float16" or array.dtype == np.float16 else 2.0**-126
        assert (np.abs(before - after) <= np.abs(before) * (OWN_ERROR[name] + slack) + tiny).all()
    elif name == "raw":
        assert payload.tobytes() == array.tobytes() and (before == after).all()


#: Every codec, and every mode of that whose payloads' sizes depend on the array.
MODES = [
    *sorted({*codec_names()} - {"bits"}),
    "bits:1", "bits:7", "bits:23", "bits:6s17", "bits:abs0.01", "bits:rel1e-3", "bits:lossless",
]  # fmt: skip


@pytest.mark.parametrize("name", MODES)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_bytes_of_the_declared_size_are_an_array_or_are_found_beforehand(name, data):
    codec, parameter = parse_codec(name)
    kinds = [*FLOATS, *([np.dtype(np.bool_), np.dtype(np.int32)] if name == "raw" else [])]
    dtype = data.draw(st.sampled_from(sorted(kinds, key=str)))
    shape = (data.draw(st.integers(0, 300)),)
    most = codec.encoded_bytes(dtype, shape, parameter)
    if dtype.kind == "f" and data.draw(st.booleans()):  # those of an array, a few of them changed
        payload = np.array(codec.encode(np.ones(shape, dtype), parameter), copy=True)
        for at in data.draw(st.lists(st.integers(0, most), max_size=3)):
            payload[at % max(1, payload.size) :][:1] = data.draw(st.integers(0, 255))
    else:
        size = most if codec.exact_size else data.draw(st.integers(0, most))
        some = data.draw(st.binary(max_size=400))
        payload = np.frombuffer(some.ljust(size, b"\1")[:size], np.uint8)
    try:
        codec.check_payload(payload, dtype, shape, parameter)
    except CodecError:
        assert not codec.exact_size or dtype == np.bool_
        return
    decoded = codec.decode(payload, dtype, shape, parameter)
    assert decoded.shape == shape and decoded.dtype == dtype


@pytest.mark.parametrize("name", LOSSY)
def test_coding_twice_changes_nothing_more(name):
    codec, parameter = parse_codec(name)
    array = np.random.default_rng(1).normal(size=1000).astype(np.float32)
    once = codec.decode(codec.encode(array, parameter), array.dtype, array.shape, parameter)
    twice = codec.decode(codec.encode(once, parameter), array.dtype, array.shape, parameter)
    np.testing.assert_allclose(twice, once, rtol=1e-6)


@pytest.mark.parametrize("name", sorted(BLOCK_ERROR))
def test_a_block_with_a_nan_or_an_infinity_arrives_as_nan_and_spoils_no_other(name):
    codec, parameter = parse_codec(f"{name}:8")
    array = np.ones(24, np.float32)
    array[3], array[20] = np.nan, -np.inf
    decoded = codec.decode(codec.encode(array, parameter), array.dtype, array.shape, parameter)
    assert np.isnan(decoded[:8]).all() and np.isnan(decoded[16:]).all()
    np.testing.assert_allclose(decoded[8:16], 1, rtol=1e-6)


def test_the_layouts_are_as_documented():
    array = np.array([127, -63.5, 0, 1, 2.5, 3.5, -127, 64, 14], np.float32)
    codec, _ = parse_codec("int8:8")
    payload = codec.encode(array, 8)
    np.testing.assert_array_equal(
        payload[:8].view(np.float32), np.float32([127, 14]) * (np.float32(1) / np.float32(127))
    )
    assert payload[8:].view(np.int8).tolist() == [127, -64, 0, 1, 2, 4, -127, 64, 127]
    codec, _ = parse_codec("int4:8")
    payload = codec.encode(np.array([7, -7, 0, 1, 2, 3, -1, -2, 7], np.float32), 8)
    low_high = [(15, 1), (8, 9), (10, 11), (7, 6), (15, 8)]
    assert payload[8:].tolist() == [low | high << 4 for low, high in low_high]
    assert parse_codec("bfloat16")[0].encode(np.float32([1.0]), 0).tolist() == [0x80, 0x3F]


@pytest.mark.parametrize(
    ("text", "match"),
    [("zip", "unknown codec"), ("int8:x", "must be a number"), ("int8:7", "multiple of 8"),
     ("int8:131072", "multiple of 8"), ("raw:3", "no parameter"), ("float16:2", "no parameter")],
)  # fmt: skip
def test_wrong_names_and_parameters_are_refused(text, match):
    with pytest.raises(CodecError, match=match):
        codec, parameter = parse_codec(text)
        codec.check(np.dtype(np.float32), parameter)


def test_a_name_or_number_is_registered_once():
    with pytest.raises(CodecError, match="already registered"):
        register(parse_codec("int8")[0])


@pytest.mark.parametrize("name", codec_names())
def test_coded_tensors_and_bundles_cross_a_link(workshop, name):
    pair = workshop.pair()
    codec, parameter = parse_codec(name)
    array = np.random.default_rng(2).normal(size=(33, 47)).astype(np.float32)
    payload = codec.encode(array, parameter)
    expected = codec.decode(payload, array.dtype, array.shape, parameter)
    pair.up.send(Tag(role=Role.ACTIVATION), array, codec=name)
    pair.up.send(Tag(role=Role.ACTIVATION), Encoded(name, payload, array.dtype, array.shape))
    for _ in range(2):
        message = pair.at_server.take()
        np.testing.assert_array_equal(message.array, expected)
        assert message.payload.codec.name == name
        np.testing.assert_array_equal(message.payload.data, payload)
    pair.down.send_bundle("w", {"x": array, "count": np.int64(3)}, {}, codec=name)
    tensors = pair.at_client.take().tensors
    np.testing.assert_array_equal(tensors["x"], expected)
    assert tensors["count"] == 3
    assert pair.up.stats().raw_out_bytes == 2 * array.nbytes
    assert pair.up.stats().payload_out_bytes == 2 * payload.nbytes


@pytest.mark.parametrize("name", [*codec_names(), "int8:64", "bits:6s17", "bits:lossless"])
def test_a_bundle_that_was_coded_before_is_that_which_a_link_codes(workshop, name):
    """Its receiver reads what its sender has read of it: a codec need not be idempotent."""
    pair, rng = workshop.pair(), np.random.default_rng(3)
    arrays = {
        "wide": rng.normal(size=(9, 31)).T,
        "narrow": rng.normal(size=(3, 5)).astype(ml_dtypes.bfloat16),
        "swapped": rng.normal(size=7).astype(">f4"),
        "none": np.zeros((0, 2), np.float32),
        "count": np.arange(5),
        "flag": np.array(True),
    }
    coded = encoded(arrays, name)
    assert {one for one in arrays if isinstance(coded[one], Encoded)} == (
        set() if name == "raw" else {"wide", "narrow", "swapped", "none"}
    )
    pair.down.send_bundle("w", arrays, {}, codec=name)
    pair.down.send_bundle("w", coded, {})
    first, second = pair.at_client.take(), pair.at_client.take()
    for one, array in decoded(coded).items():
        np.testing.assert_array_equal(first.payloads[one].data, second.payloads[one].data)
        np.testing.assert_array_equal(first.tensors[one], array)
        np.testing.assert_array_equal(second.tensors[one], array)


def test_coded_and_raw_tensors_keep_their_order(workshop):
    pair = workshop.pair()
    for step in range(40):
        array = np.full(20_000 if step % 2 else 10, step, np.float32)
        pair.up.send(
            Tag(role=Role.ACTIVATION, step=step), array, codec="int8" if step % 2 else "raw"
        )
    for step in range(40):
        message = pair.at_server.take()
        assert message.tag.step == step
        np.testing.assert_allclose(message.array, step, rtol=1e-5)


def test_bytes_that_are_not_of_the_codec_are_refused_by_the_sender(workshop):
    wrong = Encoded("int8", np.zeros(5, np.uint8), np.dtype(np.float32), (100,))
    with pytest.raises(CodecError, match="5 bytes are not a valid int8"):
        workshop.pair().up.send(Tag(role=Role.ACTIVATION), wrong)
