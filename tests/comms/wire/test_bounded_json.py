"""JSON from peers: what is taken, and that all else is one error of one line."""

from __future__ import annotations

import json
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from comms import ChannelError, FrameError
from comms.wire.bounded_json import (
    MOST_DEPTH,
    MOST_VALUES,
    MOST_WHOLE,
    decode,
    encode,
    one_line,
    reason_text,
)

NUMBERS = st.integers(-MOST_WHOLE, MOST_WHOLE) | st.floats(allow_nan=False, allow_infinity=False)
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=20,
)


@settings(max_examples=200, deadline=None)
@given(value=st.dictionaries(TEXTS, VALUES, max_size=5))
def test_what_is_encoded_comes_back(value):
    assert decode(encode(value, "a test"), "a test") == value
    assert decode(json.dumps(value, ensure_ascii=False).encode(), "a test") == value


@settings(max_examples=300, deadline=None)
@given(data=st.binary(max_size=200) | st.text('[]{},:"\\u0123dD8eE+-.nulltrefasNI ', max_size=80))
def test_no_bytes_raise_anything_else(data):
    data = data.encode() if isinstance(data, str) else data
    try:
        assert isinstance(decode(data, "a test"), dict)
    except FrameError as error:
        assert str(error).isprintable() and len(str(error)) < 400


def nested(levels, opened="[", closed="]"):
    return '{"a":' + opened * (levels - 1) + closed * (levels - 1) + "}"


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ('{"a":1e400}', "beyond float64"),
        ('{"a":-1e400}', "beyond float64"),
        ('{"a":' + "1" * 401 + "}", "401 digits"),
        ('{"a":' + "1" * 5000 + "}", "5000 digits"),
        ('{"a":-' + "1" * 30 + "}", "31 digits"),
        (f'{{"a":{MOST_WHOLE + 1}}}', "19 digits, at most 64 bits"),
        ('{"a":' + "1." + "1" * 100 + "}", "102 characters"),
        ('{"a":NaN}', "the constant NaN"),
        ('{"a":Infinity}', "the constant Infinity"),
        ('{"a":-Infinity}', "the constant -Infinity"),
        ('{"a":1,"a":2}', "a duplicate name"),
        ('{"b":{"a":1,"a":2}}', "a duplicate name"),
        ('{"a":"\\ud800"}', "surrogate"),
        ('{"\\uDFFF":1}', "surrogate"),
        (nested(MOST_DEPTH + 1), f"{MOST_DEPTH + 1} levels"),
        (nested(100_000), "100000 levels"),
        ('{"a":' * 500 + "1" + "}" * 500, "500 levels"),
        ("[" * 100_000, "100000 levels"),
        ('{"a":[' + "1," * MOST_VALUES + "1]}", "values, at most"),
        ("[]", "expected an object"),
        ("1", "expected an object"),
        ("", "Expecting value"),
        ("{", "Expecting property name"),
        ('{"a":"b', "Unterminated string"),
        ('{"a":1} {}', "Extra data"),
        ("\ufeff{}", "not acceptable JSON"),
    ],
)
def test_what_is_refused_says_why(text, match):
    with pytest.raises(FrameError, match=match):
        decode(text.encode(), "a test")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-16-le"])
def test_only_utf_8_is_taken(encoding):
    with pytest.raises(FrameError, match="not acceptable JSON"):
        decode('{"a":1}'.encode(encoding), "a test")


def test_as_deep_and_as_many_as_allowed_is_taken():
    assert decode(nested(MOST_DEPTH).encode(), "a test")["a"]
    assert decode(('{"a":["[[[[{{{{,,,,",' + "1," * (MOST_VALUES - 9) + "1]}").encode(), "a test")
    assert decode(b'{"' + b"[" * 100 + b'\\"' + b"{" * 100 + b'":1}', "a test")
    assert decode(b'{"a":"\\ud83d\\ude00"}', "a test") == {"a": "\U0001f600"}


def test_refusing_takes_little_memory():
    data = b'{"a":[' + b"[]," * (8 << 20 >> 2) + b"[]]}"
    tracemalloc.start()
    with pytest.raises(FrameError, match="values"):
        decode(data, "a test")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * len(data)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), object(), {1, 2}])
def test_what_has_no_form_in_json_is_refused_where_it_is_sent(value):
    with pytest.raises(ChannelError, match="must be plain JSON"):
        encode({"a": value}, "a control message")


def test_what_a_peer_says_is_shown_in_one_printable_line():
    assert one_line("a\nb\x1b[2J\u202ec\ud800") == "a?b?[2J?c?"
    assert len(one_line("x" * 5000)) == 1000
    for reason in ("x" * 5000, "\U0001f600" * 5000, "é" * 5000):
        assert len(encode({"code": "handshake", "reason": reason_text(reason)}, "a test")) < 4000
