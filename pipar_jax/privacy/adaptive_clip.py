"""A clip that follows a quantile of the norms of users' updates, which it learns privately. No jax.

Andrew, Thakkar, McMahan and Ramaswamy, Differentially Private Learning with Adaptive Clipping
(arXiv 1905.03871), algorithm 1: besides its update a user gives one bit, whether its norm is within
the clip, centred at zero; the sum of these bits is noised, and the clip changes geometrically.
"""

from __future__ import annotations

import math
from collections.abc import Collection

from pipar_jax.config import PrivacyConfig
from pipar_jax.privacy.noise import FARTHEST

#: The clip stays within this factor of the first: beyond, squares of norms have no room in float32.
RANGE = 1e4
#: A user's bit.
WITHIN, CLIPPED = 0.5, -0.5


class AdaptiveClip:
    """The coordinator's estimate of a quantile of the norms of updates.

    Attributes:
      value: Norm to which updates are clipped in the next round.
      share: Share of updates within the clip of the last round, as noised; None before it.

    Args:
      privacy: ``privacy.*``, with ``clip_quantile``.
      count_noise: Standard deviation of the noise on a bit, or on the sum of all bits.
      planned: How many users are planned for a round: whoever is away counts as half a bit.
    """

    def __init__(self, privacy: PrivacyConfig, count_noise: float, planned: int) -> None:
        self._privacy, self._count_noise, self._planned = privacy, count_noise, planned
        self.value = privacy.update_clip
        self.share: float | None = None

    def resume(self, value: float) -> None:
        """Goes on with the clip of an earlier part of the run."""
        self.value = value

    def adapt(self, bits: Collection[float], normal: float) -> None:
        """Takes the bits of a round's users, and changes the clip.

        Args:
          bits: ``WITHIN`` or ``CLIPPED`` of each user, with noise where devices add it.
          normal: A standard normal number, for the noise on their sum where the server adds it.
        """
        if not bits:
            return
        privacy = self._privacy
        at_device = privacy.noise_at == "device"
        # Nobody can say more than an honest user.
        most = WITHIN + (FARTHEST * self._count_noise if at_device else 0.0)
        total = sum(min(max(bit, -most), most) for bit in bits)
        if not at_device:
            total += self._count_noise * normal
        self.share = WITHIN + total / self._planned
        assert privacy.clip_quantile is not None
        # What the noise does beyond 0 and 1 is no share: without it a step is bounded.
        beyond = min(max(self.share, 0.0), 1.0) - privacy.clip_quantile
        lowest, highest = privacy.update_clip / RANGE, privacy.update_clip * RANGE
        changed = self.value * math.exp(-privacy.clip_rate * beyond)
        self.value = min(max(changed, lowest), highest)


def is_possible(privacy: PrivacyConfig, clip: float) -> bool:
    """Returns whether a coordinator that follows the protocol may name a clip."""
    lowest, highest = privacy.update_clip / RANGE, privacy.update_clip * RANGE
    return lowest * (1 - 1e-9) <= clip <= highest * (1 + 1e-9)
