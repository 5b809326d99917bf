"""The bit-level codec: bounds that hold, nothing lost where nothing may be, hostile payloads."""

from __future__ import annotations

import struct

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from comms import CodecError, parse_codec
from comms.codecs import bit_planes
from comms.codecs.bit_payload import RAW, SIGNED, SPARSE
from comms.codecs.bit_settings import Setting
from comms.codecs.cast import FLOATS

F32 = np.dtype(np.float32)


def coded(text: str, array: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the payload and what it is read as."""
    codec, parameter = parse_codec(text)
    payload = codec.encode(array, parameter)
    assert payload.size <= codec.encoded_bytes(array.dtype, array.shape, parameter)
    return payload, codec.decode(payload, array.dtype, array.shape, parameter)


def flags(payload: np.ndarray) -> int:
    return int(payload[:4].view("<u4")[0])


def floats(dtype=F32, **values):
    """Arrays of any numbers of a type, many of them zero, long enough for several blocks."""
    width = 8 * np.dtype(dtype).itemsize
    shown = np.uint16 if width == 16 else np.uint32 if width == 32 else np.uint64
    shapes = hnp.array_shapes(min_dims=1, max_dims=2, min_side=0, max_side=90)
    any_bits = st.integers(0, 2**width - 1) | st.sampled_from([0, 1, 2**width - 1, 48])
    return hnp.arrays(shown, shapes, elements=any_bits, fill=any_bits).map(
        lambda bits: bits.view(dtype)
    )


@settings(max_examples=120, deadline=None)
@given(data=st.data(), exponent=st.floats(-17, 17), kind=st.sampled_from(("abs", "rel")))
def test_a_bound_holds_for_all_numbers_there_are(data, exponent, kind):
    dtype = np.dtype(data.draw(st.sampled_from(sorted(FLOATS, key=str))))
    array = data.draw(floats(dtype))
    bound = 10.0 ** (exponent if kind == "abs" else -abs(exponent) / 2 - 0.01)
    text = f"bits:{kind}{bound!r}"
    _, decoded = coded(text, array)
    with np.errstate(invalid="ignore"):  # a signalling NaN is quietened by the cast
        before, after = array.astype(np.float64), decoded.astype(np.float64)
    finite = np.isfinite(before)
    if not finite.all():  # sent raw, since no step holds a bound for them
        assert decoded.tobytes() == array.tobytes()
        return
    limit = bound * (np.abs(before).max(initial=0) if kind == "rel" else 1)
    with np.errstate(over="ignore"):
        assert (np.abs(before - after) <= limit).all()


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_lossless_loses_nothing(data):
    array = data.draw(floats(data.draw(st.sampled_from(sorted(FLOATS, key=str)))))
    _, decoded = coded("bits:lossless", array)
    assert decoded.tobytes() == array.tobytes()


@settings(max_examples=80, deadline=None)
@given(array=floats(), bits=st.integers(1, 23), stochastic=st.booleans())
def test_an_element_is_off_by_half_a_step_of_its_block_at_most(array, bits, stochastic):
    stochastic = stochastic and bits <= 15
    payload, decoded = coded(f"bits:{bits}{'s' * stochastic}", array)
    with np.errstate(invalid="ignore"):
        before = array.reshape(-1).astype(np.float64)
        after = decoded.reshape(-1).astype(np.float64)
    if flags(payload) & SPARSE:  # blocks are of what is not zero
        assert (after[before == 0] == 0).all()
        before, after = before[array.reshape(-1) != 0], after[array.reshape(-1) != 0]
    if flags(payload) & RAW:
        assert decoded.tobytes() == array.tobytes()
        return
    for begin in range(0, before.size, 64):
        block, read = before[begin : begin + 64], after[begin : begin + 64]
        top = np.abs(block).max()
        if not np.isfinite(block).all():
            assert np.isnan(read).all()
            continue
        if top < 2.0**-100:
            assert (read == 0).all()
            continue
        # 2^E is the power of two at or below the largest, or the next one if it rounds up to that.
        mantissa, exponent = np.frexp(top)
        up = mantissa > 1 - 2.0**-bits if stochastic else mantissa >= 1 - 2.0 ** -(bits + 1)
        half = 2.0 ** (exponent - 1 + up - bits)
        if exponent + up > 128:  # 2^128 does not fit the type: it is read as a step less
            half = 2.0 ** (128 - bits)
        assert np.abs(block - read).max() <= half * (1 + stochastic)


def test_random_rounding_is_right_in_the_mean_and_repeats():
    array = np.random.default_rng(5).uniform(-1, 1, 200_000).astype(np.float32)
    array[0] = 1.0
    _, nearest = coded("bits:2", np.full_like(array, 0.3))
    payload, decoded = coded("bits:2s", np.concatenate([array[:1], np.full(199_999, 0.3, F32)]))
    assert abs(float(decoded[64:].mean()) - 0.3) < 2e-3 < abs(float(nearest[64:].mean()) - 0.3)
    again, _ = coded("bits:2s", np.concatenate([array[:1], np.full(199_999, 0.3, F32)]))
    other, _ = coded("bits:2s7", np.concatenate([array[:1], np.full(199_999, 0.3, F32)]))
    assert again.tobytes() == payload.tobytes() != other.tobytes()
    _, decoded = coded("bits:5s", array)
    assert abs(float((decoded - array).mean())) < 2e-4


def test_bits_and_the_bitmap_are_sent_only_where_they_pay():
    rng = np.random.default_rng(6)
    signed = rng.normal(size=6400).astype(np.float32)
    dense, sparse = np.abs(signed), np.maximum(signed, 0)
    sizes = {
        what: (len(payload), flags(payload))
        for what, (payload, _) in {
            "signed": coded("bits:4", signed), "dense": coded("bits:4", dense),
            "sparse": coded("bits:4", sparse), "zero": coded("bits:4", 0 * dense),
            "few": coded("bits:1", np.where(np.arange(6400) % 2, dense, 0).astype(F32)),
        }.items()
    }  # fmt: skip
    # A head, a byte per block of 64, and 4 bits per element, or 5.
    assert sizes["signed"] == (8 + 104 + 6400 * 5 // 8, SIGNED)
    assert sizes["dense"] == (8 + 104 + 6400 * 4 // 8, 0)
    kept = int((sparse != 0).sum())
    blocks = -(-kept // 64)
    assert sizes["sparse"] == (8 + 800 + -(-blocks // 8) * 8 + blocks * 32, SPARSE)
    assert sizes["zero"][0] == 8 + 800
    assert sizes["few"][1] == 0  # a bit for each to save one of a bit


def test_the_layout_is_as_documented():
    array = np.zeros(64, F32)
    array[:4] = 1, -0.5, 0.25, 0.126
    payload, decoded = coded("bits:3", array)
    assert payload[:8].tobytes() == struct.pack("<Ii", SIGNED, 0)
    assert payload[8] == 127  # the largest is 2^0, a step 2^(0 + 1 - 3)
    # Multiples of a quarter: 4 = 0100, -2 = 1110, 1 = 0001, 1 = 0001, plane by plane.
    assert payload[16:].view("<u8").tolist() == [0b1100, 0b0010, 0b0011, 0b0010]
    np.testing.assert_array_equal(decoded[:5], [1, -0.5, 0.25, 0.25, 0])
    several = np.zeros(1280, F32)
    several[[0, 9]] = 1, 0.5
    payload, _ = coded("bits:1", several)
    assert payload[:8].tobytes() == struct.pack("<Ii", SPARSE, 0)
    assert payload[8:168].tolist() == [1, 2] + 158 * [0]
    assert (payload[168], payload[176:].view("<u8").tolist()) == (127, [1])
    payload, _ = coded("bits:abs0.25", np.full(64, -3, F32))
    assert payload[:8].tobytes() == struct.pack("<Ii", 0, -1)
    assert payload[8] == 128 + 4  # -6 = 1010
    assert payload[16:].view("<u8").tolist() == [0, 2**64 - 1, 0, 2**64 - 1]
    payload, _ = coded("bits:lossless", np.full(64, -2, F32))  # c0000000, turned 80000001
    assert (payload[8], payload[16]) == (0x80, 1)
    assert payload[24:].view("<u8").tolist() == [2**64 - 1]


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_hostile_payloads_are_refused_or_read_within_their_shape(data):
    text = data.draw(
        st.sampled_from(("bits:1", "bits:6", "bits:23", "bits:abs1e-3", "bits:lossless"))
    )
    dtype = np.dtype(data.draw(st.sampled_from((np.float32, np.float16, ml_dtypes.bfloat16))))
    count = data.draw(st.integers(0, 300))
    codec, parameter = parse_codec(text)
    real = codec.encode(np.arange(count).astype(dtype) % 7, parameter)
    way = data.draw(st.integers(0, 2))
    if way == 0:
        payload = bytes(data.draw(st.integers(0, 8)) for _ in range(8))
        payload += data.draw(st.binary(max_size=600))
    else:
        payload = bytearray(real)
        for _ in range(data.draw(st.integers(1, 4))):
            at = data.draw(st.integers(0, min(len(payload) - 1, 60)))
            payload[at] = data.draw(st.integers(0, 255))
        if way == 2:
            payload = payload[: data.draw(st.integers(0, len(payload)))]
    try:
        array = codec.decode(np.frombuffer(bytes(payload), np.uint8), dtype, (count,), parameter)
    except CodecError as error:
        assert "cannot be read" in str(error)
    else:
        assert array.shape == (count,) and array.dtype == dtype


@pytest.mark.parametrize(
    ("text", "match"),
    [("bits:0", "1 to 23"), ("bits:24", "1 to 23"), ("bits:16s", "1 to 15"), ("bits:x", "write"),
     ("bits:6s999", "seed"), ("bits:abs", "write"), ("bits:abs1e", "write"), ("bits:rel2", "bound"),
     ("bits:abs0", "bound"), ("bits:abs1e-30", "bound"), ("bits:rel-1", "bound"),
     ("bits:4000000000", "mode")],
)  # fmt: skip
def test_wrong_parameters_are_refused_in_words(text, match):
    with pytest.raises(CodecError, match=match):
        codec, parameter = parse_codec(text)
        codec.check(F32, parameter)


def test_a_parameter_says_what_its_name_says_and_never_a_larger_bound():
    assert parse_codec("bits:6")[1] == 6 and parse_codec("bits")[1] == 7
    assert Setting.of(parse_codec("bits:6s17")[1])[1:3] == (6, 17)
    for bound in (1e-3, 0.1, 0.3, 1 / 3, 0.5, 1e-17):
        kept = Setting.of(parse_codec(f"bits:abs{bound!r}")[1]).bound
        assert bound * (1 - 2**-7) <= kept <= bound
    precision = [parse_codec(text) for text in ("bits:7", "int8", "int4", "bfloat16", "fp8", "raw")]
    assert [one.precision_bits(p) for one, p in precision] == [8, 8, 4, 9, 5, None]


@settings(max_examples=40, deadline=None)
@given(data=st.data(), size=st.sampled_from((1, 2, 4, 8)), blocks=st.integers(0, 5))
def test_planes_hold_whatever_fits_their_width(data, size, blocks):
    kind = np.dtype(f"<u{size}")
    drawn = data.draw(st.lists(st.integers(0, 8 * size), min_size=blocks, max_size=blocks))
    widths, rng = np.array(drawn, np.uint8), np.random.default_rng(sum(drawn))
    words = rng.integers(0, 2**64 - 1, (blocks, 64), np.uint64, endpoint=True)
    shift = 64 - np.maximum(widths, 1).astype(np.uint64)
    words = np.where(widths[:, None] > 0, words >> shift[:, None], np.uint64(0))
    words = words.astype(kind).reshape(-1)
    packed = bit_planes.pack_varied(words, widths)
    assert packed.size == int(widths.sum())
    np.testing.assert_array_equal(bit_planes.unpack_varied(packed, widths, size), words)
    planes = bit_planes.pack(words, 8 * size)
    np.testing.assert_array_equal(bit_planes.unpack(planes, size), words)
