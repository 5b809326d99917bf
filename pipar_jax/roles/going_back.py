"""Where gradients are summed: all hosts of a round go back to a step that all can come from.

A host says to which steps it can go back (``Halted``). What one host says is held against what the
others say, and whoever cannot be right is out, instead of whoever can go back no further.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence

from pipar_jax.errors import RunError
from pipar_jax.protocol import messages
from pipar_jax.protocol.registry import ControlMessage
from pipar_jax.roles.membership import Membership
from pipar_jax.roles.round_attempt import RoundAttempt
from pipar_jax.runtime.host import Host
from pipar_jax.schedule.plan import COORDINATOR, is_device, is_node


class GoingBack:
    """Stops the hosts of a round, and takes them back to the step in which one has failed.

    Args:
      host: The server host, in this process.
      members: The devices and compute nodes.
    """

    def __init__(self, host: Host, members: Membership) -> None:
        self._host, self._members = host, members

    def rewind(self, now: RoundAttempt, present: Callable[[], Sequence[str]]) -> int:
        """Lets all go back to the last step that they all have completed; returns the next one.

        Others may be lost meanwhile: their places are among those that have failed then.

        Args:
          now: The round.
          present: Returns the hosts that are in it still, this process's first.
        """
        lost, now.failed = tuple(now.failed), []
        self._members.links.drop_places(*lost)
        hosts = present()
        self._ask(hosts, messages.Halt(now.index, lost), lambda: self._host.halt(lost))
        halted = self._members.collect(messages.Halted, hosts)
        broken, now.broken = now.broken, None  # all that was said of it has been read
        said = {name: halted[name].said for name in present() if name in halted}
        step, odd = common_step(said, now.steps, broken)
        if COORDINATOR in odd:
            raise RunError(f"the server cannot go back: it has {odd[COORDINATOR]}")
        for name, reason in odd.items():
            self._members.blame(name, f"'halted' with {reason}")
        hosts = [name for name in said if name not in odd]
        self._ask(hosts, messages.Rewind(now.index, step), lambda: self._host.rewind(step))
        self._members.collect(messages.Rewound, hosts)
        now.trained.clear()
        for name in hosts:
            self._members.settle(name, messages.Trained)
        now.steps = range(step, step)
        for place in lost:
            now.out[place] = dataclasses.replace(now.out[place], step=step)
        now.spans = tuple(
            span._replace(stop=min(span.stop, step)) if span.device in now.out else span
            for span in now.spans
        )
        return step

    def _ask(self, hosts: Sequence[str], command: ControlMessage, here: Callable[[], None]) -> None:
        """Gives a command to some hosts, that of this process among them."""
        here()
        for name in self._members.roll(hosts):
            self._members.send(name, command)


def common_step(
    said: Mapping[str, messages.Halted], steps: range, broken: int | None = None
) -> tuple[int, dict[str, str]]:
    """Returns the step to which all go back, and what is wrong with what some of them say.

    The server's word is taken, then that of the compute nodes as far as they agree: what devices
    share is there. A device is at most one step behind that or one ahead, and then it can go back
    to where they can (``schedule/keep.py``).

    Args:
      said: What each host has said.
      steps: The steps for which they were released last.
      broken: A step in which something was not finite, so that it has to be taken back; None: there
        is none.

    Returns:
      The step, and for each host that cannot be right what it says.
    """
    # Nobody goes back beyond what it was released for, whatever it still keeps.
    reach = {
        name: range(max(one.least, steps.start), one.step + 1)
        for name, one in said.items()
        if steps.start <= one.step <= steps.stop and one.least <= one.step
    }
    least, most = steps.start, steps.stop
    if COORDINATOR in reach:
        least, most = reach[COORDINATOR].start, reach[COORDINATOR][-1]
    nodes = {name: one for name, one in reach.items() if is_node(name)}
    agreed = _agreed(nodes.values(), least, most)
    for name, one in nodes.items():
        if agreed in one:
            least, most = max(least, one.start), min(most, one[-1])
        else:
            del reach[name]
    for name in [name for name in reach if is_device(name) and reach[name][-1] < least]:
        del reach[name]
    step = min([most, *(one[-1] for one in reach.values())])
    if broken is not None:
        step = max(least, min(step, broken))
    odd = {
        name: f"step {one.step} and least step {one.least}, where the others can go back to step "
        f"{least} and the last is {steps.stop}"
        for name, one in said.items()
        if name not in reach
    }
    return step, odd


def _agreed(reach: Collection[range], least: int, most: int) -> int:
    """Returns the step, of those between two others, that most of some ranges have."""
    starts = {max(least, one.start) for one in reach if one.start <= most}
    return max(sorted({least, *starts}), key=lambda step: sum(step in one for one in reach))
