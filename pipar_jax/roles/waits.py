"""How the coordinator's thread waits for hosts, and who goes if none of them moves."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

from comms import ChannelError
from pipar_jax.errors import PeerError
from pipar_jax.roles.mail import Member
from pipar_jax.roles.patience import Patience
from pipar_jax.schedule.plan import COORDINATOR, is_device, long_name

#: Seconds between two checks of the clock and of the stop request while waiting.
LOOK_S = 0.1
#: Seconds within which the mail about a link is read after a send has found it ended.
LAST_WORDS_S = 1.0

#: Takes the hosts that are late, and why; those of them go that it ends.
Expired = Callable[[Sequence[str], PeerError], None]


class Wait:
    """A wait for hosts, whose clock begins with it, and runs while it looks.

    Whoever waits makes one of these. So nobody waits on the clock of another wait, and what is done
    between two of them, or between two looks, such as an evaluation, is no host's delay.

    Args:
      patience: The progress deadline.
      members: The present members by name.
      poll: Handles an item of mail, if any arrives within some seconds.
      may_be_lost: Returns whether the run may go on without a host.
      lose: Ends the connection of a member.
      what: The kind of message that is waited for.
      computing: Whether the hosts compute meanwhile, so that actions that are over are progress.
      expired: What is done with hosts that are late; None: see ``suspects``.
    """

    def __init__(
        self,
        patience: Patience,
        members: Mapping[str, Member],
        *,
        poll: Callable[[float], None],
        may_be_lost: Callable[[str], bool],
        lose: Callable[[str, PeerError], None],
        what: str,
        computing: bool,
        expired: Expired | None,
    ) -> None:
        self._patience, self._members, self._poll = patience, members, poll
        self._may_be_lost, self._lose, self._what = may_be_lost, lose, what
        self._computing, self._expired = computing, expired
        self._begin()

    def _begin(self) -> None:
        self._patience.begin(computing=self._computing, waiter=self)

    def look(self, missing: Sequence[str]) -> None:
        """Waits briefly for mail, and checks that hosts make progress.

        Args:
          missing: The hosts that are waited for.

        Raises:
          PeerError: None of them does, or one was lost, and the run cannot go on without it.
        """
        self._patience.resume(computing=self._computing, waiter=self)
        self._poll(LOOK_S)
        try:
            self._patience.check(self._there(missing), self._what)
        except PeerError as error:
            late = [name for name in self._there(missing) if self._may_be_lost(name)]
            if not late:
                raise
            if self._expired is not None:
                self._expired(late, error)
            else:
                for name in suspects(late):
                    self._lose(name, error)
            self._begin()  # the others have waited for these
        self._patience.pause()

    def _there(self, names: Sequence[str]) -> list[str]:
        """Returns the hosts that are not lost."""
        return [name for name in names if name == COORDINATOR or name in self._members]


def suspects(late: Sequence[str]) -> list[str]:
    """Returns those of some late hosts that the others wait for, as far as one can tell.

    A compute node is not over with a round before its last device is: while a device is missing,
    so are all nodes.

    Args:
      late: The hosts that are late.
    """
    return [name for name in late if is_device(name)] or list(late)


class FailedSends:
    """Links that a send has found ended, until the mail about their end has been read.

    What is read says why a link has ended, and more than the send that noticed it. A send changes
    nothing else: whoever sends something to many need not fear that some of them go meanwhile.
    """

    def __init__(self) -> None:
        """Begins with none."""
        self._failed: dict[str, tuple[Member, ChannelError]] = {}
        self._since_s: dict[str, float] = {}  # of those that were looked at

    def add(self, name: str, member: Member, error: ChannelError) -> None:
        """Takes note that a send to a member has failed."""
        if name not in self._failed or self._failed[name][0] is not member:
            self._failed[name] = member, error
            self._since_s.pop(name, None)

    def forget(self, name: str) -> None:
        """Forgets a member whose loss has been reported."""
        self._failed.pop(name, None)
        self._since_s.pop(name, None)

    def due(self) -> list[tuple[str, PeerError]]:
        """Returns the members whose end no mail has told of in time, each with the reason.

        Time counts from the first call after the send: before it nobody has looked for mail.
        """
        now_s = time.monotonic()
        found = []
        for name, (_, error) in self._failed.items():
            if now_s - self._since_s.setdefault(name, now_s) >= LAST_WORDS_S:
                gone = PeerError(f"{long_name(name)} was lost: {error}")
                gone.__cause__ = error
                found.append((name, gone))
        return found
