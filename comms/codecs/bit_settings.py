"""The parameter of the bit-level codec: mode, bits, seed or bound."""

from __future__ import annotations

import re
from enum import IntEnum
from typing import NamedTuple

import numpy as np

from comms.errors import CodecError

MOST_BITS, MOST_STOCHASTIC_BITS = 23, 15
_LEAST_BOUND, _LARGEST_BOUND = 2.0**-60, 2.0**60
_WORDS = re.compile(r"(?P<bits>\d{1,2})s(?P<seed>\d{0,3})|(?P<kind>abs|rel)(?P<bound>[\d.e+-]+)")


class Mode(IntEnum):
    """How elements are coded."""

    NEAREST = 0
    STOCHASTIC = 1
    ABSOLUTE = 2
    RELATIVE = 3
    LOSSLESS = 4


class Setting(NamedTuple):
    """A parsed parameter.

    Attributes:
      mode: The mode.
      bits: K; 0 for abs, rel and lossless.
      seed: Seed of random rounding.
      bound: Bound of abs and rel, a number with 8 significant bits.
    """

    mode: Mode
    bits: int = 0
    seed: int = 0
    bound: float = 0.0

    def parameter(self) -> int:
        """Returns the setting as a number: bits 0-7 K, 8-15 the mode, 16-31 the seed or the bound.

        The bound is the upper half of a float32's bits, truncated, so that it never exceeds the
        requested one.
        """
        upper = self.seed
        if self.mode in (Mode.ABSOLUTE, Mode.RELATIVE):
            nearest = np.float32(self.bound)
            if float(nearest) > self.bound:
                nearest = np.nextafter(nearest, np.float32(0))
            upper = int(nearest.view(np.uint32)) >> 16
        return self.bits | int(self.mode) << 8 | upper << 16

    @classmethod
    def of(cls, parameter: int) -> Setting:
        """Decodes a parameter.

        Raises:
          CodecError: If it is not valid.
        """
        bits, mode, upper = parameter & 255, parameter >> 8 & 255, parameter >> 16
        try:
            kind = Mode(mode)
        except ValueError:
            raise CodecError(f"codec bits: parameter {parameter} has no known mode") from None
        if kind in (Mode.NEAREST, Mode.STOCHASTIC):
            most = MOST_BITS if kind is Mode.NEAREST else MOST_STOCHASTIC_BITS
            if not 1 <= bits <= most:
                raise CodecError(f"codec bits: an element has 1 to {most} bits, got {bits}")
            if upper > (255 if kind is Mode.STOCHASTIC else 0):
                raise CodecError(f"codec bits: a seed is 0 to 255, for bits:Ks alone, got {upper}")
            return cls(kind, bits, seed=upper)
        if bits or (kind is Mode.LOSSLESS and upper) or upper > 0xFFFF:
            what = kind.name.lower()
            raise CodecError(f"codec bits: parameter {parameter} is not valid for {what}")
        if kind is Mode.LOSSLESS:
            return cls(kind)
        bound = float(np.uint32(upper << 16).view(np.float32))
        largest = _LARGEST_BOUND if kind is Mode.ABSOLUTE else 1.0
        if not _LEAST_BOUND <= bound <= largest:
            raise CodecError(
                f"codec bits: a bound is {_LEAST_BOUND:g} to {largest:g}, got {bound:g}"
            )
        return cls(kind, bound=bound)

    @classmethod
    def parse(cls, text: str) -> Setting:
        """Parses ``6s``, ``6s17``, ``abs1e-3``, ``rel1e-3`` or ``lossless``.

        Raises:
          CodecError: If the text is not valid.
        """
        if text == "lossless":
            return cls(Mode.LOSSLESS)
        match = _WORDS.fullmatch(text)
        try:
            if match is None:
                raise ValueError
            if match["kind"] is None:
                setting = cls(Mode.STOCHASTIC, int(match["bits"]), int(match["seed"] or 0))
            else:
                mode = Mode.ABSOLUTE if match["kind"] == "abs" else Mode.RELATIVE
                setting = cls(mode, bound=float(match["bound"]))
            parameter = setting.parameter()
        except ValueError:
            raise CodecError(
                f"codec 'bits:{text}': write bits:6 (bits per element), bits:6s (rounded at "
                "random), bits:abs1e-3 or bits:rel1e-3 (largest error), or bits:lossless"
            ) from None
        return cls.of(parameter)
