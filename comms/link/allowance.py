"""Limits on what a peer may send, before and after its admission."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Self

from comms.errors import ChannelError
from comms.options import Limits

_USUAL = Limits()


@dataclass(frozen=True, slots=True, kw_only=True)
class Allowance:
    """What a link's owner permits its peer to send, within the endpoint's ``Limits``.

    Sizes are those of the array before or after the codec, whichever is larger, so that a small
    payload cannot declare a large array. Decoding temporarily takes up to six times that.

    Attributes:
      tensor_bytes: Largest tensor outside bundles (activation, cotangent, label); 0 allows none
        that has elements.
      bundle_bytes: Largest sum of a bundle's tensors.
      bundle_tensors: Maximum number of tensors in a bundle; 0 allows only empty bundles.
      control_bytes: Largest control message or manifest of a bundle.
    """

    tensor_bytes: int
    bundle_bytes: int
    bundle_tensors: int = _USUAL.bundle_tensors
    control_bytes: int = _USUAL.control_bytes

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
          ChannelError: If a value is not a whole number from 0.
        """
        for field in fields(self):
            value = getattr(self, field.name)
            if type(value) is not int or value < 0:
                raise ChannelError(
                    f"Allowance.{field.name} must be a whole number from 0, got {value!r}"
                )

    @classmethod
    def of(cls, limits: Limits) -> Self:
        """Returns the largest allowance within the endpoint's limits."""
        return cls(
            tensor_bytes=limits.message_bytes,
            bundle_bytes=limits.message_bytes,
            bundle_tensors=limits.bundle_tensors,
            control_bytes=limits.control_bytes,
        )

    def within(self, limits: Limits) -> Self:
        """Returns the minimum of this and the endpoint's limits, field by field."""
        most = self.of(limits)
        names = [field.name for field in fields(self)]
        return type(self)(**{name: min(getattr(self, name), getattr(most, name)) for name in names})
