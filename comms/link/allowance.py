"""What a peer may send: until its owner has admitted it, and from then on."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Self

from comms.errors import ChannelError
from comms.options import Limits

_USUAL = Limits()


@dataclass(frozen=True, slots=True, kw_only=True)
class Allowance:
    """What a link's owner lets its peer send; never more than ``Limits`` say, whatever is asked.

    Sizes count the array before or after the codec, whichever is more, so that a small payload
    cannot declare a large array. While it runs, decoding takes at most six times that.

    Attributes:
      tensor_bytes: Largest tensor outside bundles (activation, cotangent, label); 0 allows none
        that has elements.
      bundle_bytes: Largest sum of a bundle's tensors.
      bundle_tensors: Most tensors in a bundle; 0 allows only bundles without any.
      control_bytes: Largest control message or manifest of a bundle.
    """

    tensor_bytes: int
    bundle_bytes: int
    bundle_tensors: int = _USUAL.bundle_tensors
    control_bytes: int = _USUAL.control_bytes

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
          ChannelError: If one is no count of bytes.
        """
        for field in fields(self):
            value = getattr(self, field.name)
            if type(value) is not int or value < 0:
                raise ChannelError(
                    f"Allowance.{field.name} must be a whole number from 0, got {value!r}"
                )

    @classmethod
    def of(cls, limits: Limits) -> Self:
        """Returns all that the endpoint's limits let any peer send."""
        return cls(
            tensor_bytes=limits.message_bytes,
            bundle_bytes=limits.message_bytes,
            bundle_tensors=limits.bundle_tensors,
            control_bytes=limits.control_bytes,
        )

    def within(self, limits: Limits) -> Self:
        """Returns the smaller of this and the endpoint's limits, field by field."""
        most = self.of(limits)
        names = [field.name for field in fields(self)]
        return type(self)(**{name: min(getattr(self, name), getattr(most, name)) for name in names})
