"""Bounded decoding of JSON from a peer, checked before and while it is decoded.

The standard decoder accepts numbers of any length (and raises one of four errors for some), NaN and
Infinity, duplicate keys, unpaired surrogates, four encodings, and any depth up to the recursion
limit; two bytes can become a list of 56. Here all of these are rejected by one error with a short
message.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any, TypeAlias

import numpy as np

from comms.errors import ChannelError, FrameError

JsonBody: TypeAlias = dict[str, Any]
"""What a control message, a manifest or a greeting says."""
MOST_DEPTH = 32
"""Maximum depth of lists and objects."""
MOST_VALUES = 1 << 19
"""Maximum number of values, without the names in objects."""
MOST_WHOLE = (1 << 63) - 1
"""Largest magnitude of a whole number."""
_MOST_DIGITS = 64

# Possessive, so that skipping a text of megabytes takes no memory.
_TEXT = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)
_NOT_STRUCTURE = bytes(set(range(256)) - set(b"[]{},"))
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


class _Refused(ValueError):
    """Raised by the hooks, with the reason."""


def decode(data: bytes | bytearray | memoryview, what: str) -> JsonBody:
    """Decodes a JSON object from UTF-8.

    Args:
      data: The bytes, whose number the caller limits.
      what: Names the bytes in messages.

    Returns:
      An object of encodable texts, finite floats, 64-bit whole numbers, booleans, None, lists and
      objects, with at most ``MOST_DEPTH`` levels and ``MOST_VALUES`` values.

    Raises:
      FrameError: If the bytes are not such an object.
    """
    raw = bytes(data)
    try:
        _check_structure(raw)
        value = _DECODER.decode(raw.decode("utf-8"))
        if _SURROGATE.search(raw):
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise FrameError(f"{what} is not acceptable JSON: an unpaired surrogate") from None
    except (ValueError, RecursionError) as error:
        raise FrameError(f"{what} is not acceptable JSON: {one_line(error, 200)}") from None
    if not isinstance(value, dict):
        raise FrameError(f"{what} is not acceptable JSON: expected an object")
    return value


def encode(value: JsonBody, what: str) -> bytes:
    """Encodes a JSON object as UTF-8 that ``decode`` accepts.

    Raises:
      ChannelError: If it has a value that JSON cannot represent, such as NaN.
    """
    try:
        return json.dumps(value, separators=(",", ":"), allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise ChannelError(f"{what} must be plain JSON: {error}") from error


def one_line(text: object, most: int = 1000) -> str:
    """Returns a peer's text in printable form and of bounded length, for logs and terminals."""
    said = str(text)[:most]
    return said if said.isprintable() else "".join(c if c.isprintable() else "?" for c in said)


def reason_text(reason: object) -> str:
    """Returns a reason for a peer, short enough for 4 KiB of JSON."""
    text = one_line(reason)
    return text if text.isascii() else text[:300]  # an escape has up to 12 bytes


def _check_structure(raw: bytes) -> None:
    """Checks depth and number of values before they are decoded."""
    if len(raw) <= MOST_VALUES and raw.count(b"[") + raw.count(b"{") <= MOST_DEPTH:
        return  # the usual case
    structure = _TEXT.sub(b"", raw).translate(None, _NOT_STRUCTURE)
    marks = np.frombuffer(structure, np.uint8)
    opens, closes = (marks == 91) | (marks == 123), (marks == 93) | (marks == 125)
    values = int(np.count_nonzero(~closes)) + 1
    if values > MOST_VALUES:
        raise _Refused(f"about {values} values, at most {MOST_VALUES} are accepted")
    levels = np.cumsum(opens.astype(np.int8) - closes.astype(np.int8), dtype=np.int32)
    if (depth := int(levels.max(initial=0))) > MOST_DEPTH:
        raise _Refused(f"{depth} levels, at most {MOST_DEPTH} are accepted")


def _whole(digits: str) -> int:
    if len(digits) > 20 or abs(number := int(digits)) > MOST_WHOLE:
        raise _Refused(f"a whole number of {len(digits)} digits, at most 64 bits are accepted")
    return number


def _real(digits: str) -> float:
    if len(digits) > _MOST_DIGITS:
        raise _Refused(f"a number of {len(digits)} characters, at most {_MOST_DIGITS} are accepted")
    if not math.isfinite(number := float(digits)):
        raise _Refused(f"the number {digits}, which is beyond float64")
    return number


def _word(name: str) -> None:
    raise _Refused(f"the constant {name}")


def _object(pairs: list[tuple[str, Any]]) -> JsonBody:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise _Refused("a duplicate name in an object")
    return made


_DECODER = json.JSONDecoder(
    parse_int=_whole, parse_float=_real, parse_constant=_word, object_pairs_hook=_object
)
