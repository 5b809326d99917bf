"""One host's share of a plan: which weights it holds, which sizes it meets, where results go."""

from __future__ import annotations

from collections.abc import Sequence

from comms import Link
from pipar_jax.runtime.link_table import Wiring
from pipar_jax.schedule.actions import (
    ALL,
    BACKWARD,
    FORWARD,
    LAST,
    Action,
    batch_samples,
    micro_batch_sizes,
)
from pipar_jax.schedule.dispatch import Gate, GatedOutlet
from pipar_jax.schedule.feasibility import check_executable
from pipar_jax.schedule.plan import Boundary, Plan


class Outlet:
    """A link as the dispatcher sees it: its credit less what is already promised to it.

    Attributes:
      promised: Bytes of results that were dispatched and not handed to the link yet.
    """

    def __init__(self, link: Link) -> None:
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
      wiring: The host's links.
      cut_bytes: For each cut the bytes of one sample's activation.

    Raises:
      PlanError: No host of this runtime could carry the plan out.
    """

    def __init__(self, plan: Plan, host: str, wiring: Wiring, cut_bytes: Sequence[int]) -> None:
        check_executable(plan)
        self._plan, self._host, self._wiring, self._cut_bytes = plan, host, wiring, cut_bytes
        self._outlets: dict[Boundary, Outlet] = {}
        self._gates: dict[int, Gate] = {}

    def takes_part(self, device: int) -> bool:
        """Says whether the host runs a stage of a device."""
        stages = range(self._plan.devices[device].stages)
        return any(self._plan.host(device, stage) == self._host for stage in stages)

    def slot(self, device: int, stage: int) -> tuple[int, int]:
        """Returns the key of the weights that a device's stage uses on its host."""
        return (ALL if self._plan.is_shared(device, stage) else device), stage

    def gate(self, action: Action) -> Gate | None:
        """Returns what caps the micro-batches of an action's stage, if anything does."""
        capped = self._plan.in_flight and self._plan.sums_gradients
        if not capped or not self._plan.is_local(action.stage):
            return None
        return self._gates.setdefault(action.stage, Gate(self._plan.in_flight))

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
        boundary = self._plan.boundary(action.device, min(action.stage, goes_to))
        if boundary.lower == boundary.upper:
            return None
        if boundary not in self._outlets:
            self._outlets[boundary] = Outlet(self._wiring.of(boundary))
        cut = self._plan.devices[action.device].cuts[boundary.below]
        return self._outlets[boundary], self._cut_bytes[cut] * samples

    def asked(self, action: Action, samples: int) -> tuple[Outlet | GatedOutlet, int] | None:
        """Returns what a dispatcher asks before it hands an action out: gate, link, or both."""
        outlet = self.outlet(action, samples)
        gate = self.gate(action) if action.kind == FORWARD else None
        if gate is None:
            return outlet
        link, nbytes = outlet or (None, 0)
        return GatedOutlet(gate, link), nbytes
