"""One host's share of a plan: which weights it holds, which sizes it meets, where results go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from comms import Link
from pipar_jax.errors import PlanError
from pipar_jax.plan import COORDINATOR, OWNER, Plan, device_name
from pipar_jax.schedule import (
    ALL,
    BACKWARD,
    FORWARD,
    LAST,
    Action,
    batch_samples,
    micro_batch_sizes,
)


class Outlet:
    """A link as the dispatcher sees it: its credit less what is already promised to it.

    Attributes:
      promised: Bytes of results that were dispatched and not handed to the link yet.
    """

    def __init__(self, link: Link) -> None:
        """See the class."""
        self._link = link
        self.promised = 0

    def can_send(self, nbytes: int) -> bool:
        """Says whether the link takes a result of this size now."""
        if not self.promised:
            return self._link.can_send(nbytes)
        return self._link.available_bytes >= nbytes + self.promised


class Share:
    """What a plan means for one host.

    Args:
      plan: The run's plan.
      host: The host's name.
      links: For each peer its link.
      cut_bytes: For each cut the bytes of one sample's activation.

    Raises:
      PlanError: No host of this runtime could carry the plan out.
    """

    def __init__(
        self, plan: Plan, host: str, links: Mapping[str, Link], cut_bytes: Sequence[int]
    ) -> None:
        """See the class."""
        check_executable(plan)
        self._plan, self._host, self._links, self._cut_bytes = plan, host, links, cut_bytes
        self._outlets: dict[str, Outlet] = {}

    def takes_part(self, device: int) -> bool:
        """Says whether the host runs a stage of a device."""
        stages = range(self._plan.devices[device].stages)
        return any(self._plan.host(device, stage) == self._host for stage in stages)

    def slot(self, device: int, stage: int) -> tuple[int, int]:
        """Returns the key of the weights that a device's stage uses on its host."""
        own = self._plan.devices[device].hosts[stage] == OWNER
        return (device if own or self._plan.weights == "copy" else ALL), stage

    def sizes(self, samples: Sequence[int], batch_size: int) -> set[int]:
        """Returns every micro-batch size that the host meets in an epoch.

        Args:
          samples: Samples that each device trains on in an epoch.
          batch_size: Samples in a full mini-batch.
        """
        found: set[int] = set()
        for device, one in enumerate(self._plan.devices):
            if self.takes_part(device):
                last = -(-samples[device] // batch_size) - 1
                for step in {0, last}:
                    size = batch_samples(samples[device], batch_size, step)
                    found.update(micro_batch_sizes(size, one.micro_batches))
        return found

    def outlet(self, action: Action, samples: int) -> tuple[Outlet, int] | None:
        """Returns the link that an action's result leaves by and the result's bytes.

        Args:
          action: The action.
          samples: Samples in its micro-batch.

        Returns:
          None where the result stays on the host.
        """
        if action.kind == FORWARD:
            goes_to = action.stage + 1
        elif action.kind in (BACKWARD, LAST) and action.stage:
            goes_to = action.stage - 1
        else:
            return None
        peer = self._plan.host(action.device, goes_to)
        if peer == self._host:
            return None
        if peer not in self._outlets:
            self._outlets[peer] = Outlet(self._links[peer])
        cut = self._plan.devices[action.device].cuts[min(action.stage, goes_to)]
        return self._outlets[peer], self._cut_bytes[cut] * samples


def check_executable(plan: Plan) -> None:
    """Refuses plans that no host of this runtime could carry out.

    Raises:
      PlanError: Devices share weights in parallel, or a stage lies on a host that nobody runs.
    """
    if plan.weights == "shared" and plan.order == "parallel":
        raise PlanError(
            "plan.weights='shared' needs plan.order='sequential': gradients of devices in parallel "
            "are not summed; use weights='copy'"
        )
    for device, one in enumerate(plan.devices):
        chain = {plan.host(device, stage) for stage in range(one.stages)}
        others = sorted(chain - {COORDINATOR, device_name(device)})
        if others:
            raise PlanError(
                f"device {device} has stages on {', '.join(others)}: a stage runs on the device "
                f"itself or on {COORDINATOR}"
            )
