"""JSON from a peer, bounded: what it may hold is checked before and while it is read.

The standard decoder takes numbers of any length (and raises one of four errors for some), words
that are no JSON (NaN, Infinity), a key twice, halves of surrogate pairs that no file or terminal
takes, four encodings, and any depth up to the recursion limit. Two bytes can become a list of 56.
Here each is refused by one kind of error, whose text is one short line.
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
"""Lists and objects inside each other."""
MOST_VALUES = 1 << 19
"""Texts, numbers, words, lists and objects in all, but for the names in objects."""
MOST_WHOLE = (1 << 63) - 1
"""Largest magnitude of a whole number."""
_MOST_DIGITS = 64

# Possessive, so that a text of megabytes takes no memory to be skipped.
_TEXT = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)
_NOT_STRUCTURE = bytes(set(range(256)) - set(b"[]{},"))
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


class _Refused(ValueError):
    """What the hooks raise; the argument says why."""


def decode(data: bytes | bytearray | memoryview, what: str) -> JsonBody:
    """Returns the JSON object that UTF-8 bytes hold.

    Args:
      data: The bytes; their number is the caller's to bound.
      what: What they are, for the message.

    Returns:
      An object of texts that can be encoded, finite floats, whole numbers of 64 bits, booleans,
      None, lists and further objects, of at most ``MOST_DEPTH`` levels and ``MOST_VALUES`` values.

    Raises:
      FrameError: If they are no such object.
    """
    raw = bytes(data)
    try:
        _check_structure(raw)
        value = _DECODER.decode(raw.decode("utf-8"))
        if _SURROGATE.search(raw):
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise FrameError(f"{what} is no JSON that is taken: half a surrogate pair") from None
    except (ValueError, RecursionError) as error:
        raise FrameError(f"{what} is no JSON that is taken: {one_line(error, 200)}") from None
    if not isinstance(value, dict):
        raise FrameError(f"{what} is no JSON that is taken: expected an object")
    return value


def encode(value: JsonBody, what: str) -> bytes:
    """Returns the UTF-8 bytes of a JSON object that ``decode`` takes.

    Raises:
      ChannelError: If it holds what JSON has no form for, NaN and infinities among it.
    """
    try:
        return json.dumps(value, separators=(",", ":"), allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise ChannelError(f"{what} must be plain JSON: {error}") from error


def one_line(text: object, most: int = 1000) -> str:
    """Returns what a peer said so that a log or a terminal can show it: printable and bounded."""
    said = str(text)[:most]
    return said if said.isprintable() else "".join(c if c.isprintable() else "?" for c in said)


def reason_text(reason: object) -> str:
    """Returns why something ends, for a peer: short enough that its JSON fits into 4 KiB."""
    text = one_line(reason)
    return text if text.isascii() else text[:300]  # an escape takes up to 12 bytes


def _check_structure(raw: bytes) -> None:
    """Bounds depth and values before anything is made of them."""
    if len(raw) <= MOST_VALUES and raw.count(b"[") + raw.count(b"{") <= MOST_DEPTH:
        return  # as most messages
    structure = _TEXT.sub(b"", raw).translate(None, _NOT_STRUCTURE)
    marks = np.frombuffer(structure, np.uint8)
    opens, closes = (marks == 91) | (marks == 123), (marks == 93) | (marks == 125)
    values = int(np.count_nonzero(~closes)) + 1
    if values > MOST_VALUES:
        raise _Refused(f"about {values} values, at most {MOST_VALUES} are taken")
    levels = np.cumsum(opens.astype(np.int8) - closes.astype(np.int8), dtype=np.int32)
    if (depth := int(levels.max(initial=0))) > MOST_DEPTH:
        raise _Refused(f"{depth} levels, at most {MOST_DEPTH} are taken")


def _whole(digits: str) -> int:
    if len(digits) > 20 or abs(number := int(digits)) > MOST_WHOLE:
        raise _Refused(f"a whole number of {len(digits)} digits, at most 64 bits are taken")
    return number


def _real(digits: str) -> float:
    if len(digits) > _MOST_DIGITS:
        raise _Refused(f"a number of {len(digits)} characters, at most {_MOST_DIGITS} are taken")
    if not math.isfinite(number := float(digits)):
        raise _Refused(f"the number {digits}, which is beyond float64")
    return number


def _word(name: str) -> None:
    raise _Refused(f"the word {name}")


def _object(pairs: list[tuple[str, Any]]) -> JsonBody:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise _Refused("a name twice in one object")
    return found


_DECODER = json.JSONDecoder(
    parse_int=_whole, parse_float=_real, parse_constant=_word, object_pairs_hook=_object
)
