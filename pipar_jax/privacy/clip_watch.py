"""Notices clips that nothing ever reaches, or everything exceeds. For a device's own eyes: no jax.

How many samples were clipped is a function of the data. So a device counts for itself, and what it
finds goes to its log and to the terminal from which it was started, and in no message.
"""

from __future__ import annotations

import logging

from pipar_jax.config import PrivacyConfig
from pipar_jax.privacy.policy import ACTIVATIONS, COTANGENTS, GRADIENTS, UPDATES

#: What is said of a device's own data, to whoever runs it.
CLIP_LOG = logging.getLogger(__name__)
#: The field of each kind's clip, and how many have to be seen before anything is said.
_CLIPS = {
    ACTIVATIONS: ("activation_clip", 100),
    GRADIENTS: ("update_clip", 100),
    COTANGENTS: ("cotangent_clip", 100),
    UPDATES: ("update_clip", 3),
}


class ClipWatch:
    """Counts what was above its clip.

    Args:
      privacy: ``privacy.*``.
    """

    def __init__(self, privacy: PrivacyConfig) -> None:
        self._privacy = privacy
        self._above = dict.fromkeys(_CLIPS, 0)
        self._seen = dict.fromkeys(_CLIPS, 0)
        self._told: set[str] = set()

    def add(self, kind: str, above: int, seen: int) -> None:
        """Counts some samples, gradients or updates.

        Args:
          kind: What they are.
          above: How many of them were clipped.
          seen: How many there were.
        """
        self._above[kind] += above
        self._seen[kind] += seen

    def warnings(self) -> list[str]:
        """Returns what is to be said now; of each kind once."""
        said = []
        for kind, (field, enough) in _CLIPS.items():
            above, seen = self._above[kind], self._seen[kind]
            if seen < enough or kind in self._told or 0 < above < seen:
                continue
            self._told.add(kind)
            clip = f"privacy.{field}={getattr(self._privacy, field):g}"
            if above:
                said.append(
                    f"all of the first {seen} {kind} exceeded {clip} and were scaled down to it: "
                    "a higher clip keeps more of them, with more noise"
                )
            else:
                said.append(
                    f"none of the first {seen} {kind} exceeded {clip}: a lower clip would do with "
                    "less noise"
                )
        return said
