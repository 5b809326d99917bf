"""The last message of a device or node, which says why it ends its part of a run."""

from __future__ import annotations

from comms import ChannelError, Link
from pipar_jax.errors import DataError, PiparError
from pipar_jax.protocol import messages, registry
from pipar_jax.schedule.plan import long_name


class LastWords:
    """Tells the coordinator why a host ends, so that it need not guess.

    Attributes:
      link: The link to the coordinator, once there is one.
      told_so: Whether the coordinator itself has ended this host's part, and knows.

    Args:
      name: The host's name.
      private: Whether errors about the host's data stay with it.
    """

    def __init__(self, name: str, *, private: bool) -> None:
        self._long, self._private = long_name(name), private
        self.link: Link | None = None
        self.told_so = False

    def failed(self, error: Exception) -> None:
        """Says which error ends the host."""
        reason = str(error)
        if self._private and not is_public(error):
            reason = (
                f"{self._long} failed, and says why in its own log alone: in a private run errors "
                "about its data, or in its own code, do not leave it"
            )
        self._say(messages.Failed(reason))

    def interrupted(self) -> None:
        """Says that its user has ended it."""
        self._say(messages.Leave(f"{self._long} was interrupted"))

    def _say(self, said: messages.Failed | messages.Leave) -> None:
        if self.told_so or self.link is None:
            return
        try:
            registry.send(self.link, said)
            self.link.drain(1.0)
        except ChannelError:
            return  # the coordinator is gone too; the error itself is raised by the caller


def is_public(error: Exception) -> bool:
    """Returns whether an error's text has nothing of a device's data.

    It is not about reading them, and neither a library nor the user's code has written part of it.

    Args:
      error: What ended a device of a private run.
    """
    cause = error.__cause__
    ours = isinstance(error, PiparError) and not isinstance(error, DataError)
    return ours and (cause is None or isinstance(cause, PiparError | ChannelError | OSError))
