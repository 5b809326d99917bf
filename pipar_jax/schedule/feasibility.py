"""Checks of plans: whether the runtime can execute them, and change them during a run."""

from __future__ import annotations

from pipar_jax.errors import PlanError
from pipar_jax.schedule.plan import COORDINATOR, Order, Plan, WeightPolicy, device_name, is_node


def check_adaptable(plan: Plan) -> None:
    """Rejects plans that cannot change during a run.

    Raises:
      PlanError: Devices train in turn, or share weights on the coordinator's host.
    """
    shared = plan.weights == WeightPolicy.SHARED and not any(map(plan.local_stages, plan.hosts()))
    if plan.order != Order.PARALLEL or shared:
        raise PlanError(
            "tuner.adapt needs devices in parallel, with weights copied, or shared on compute "
            f"nodes; the plan is {plan}: set tuner.adapt=false"
        )


def check_executable(plan: Plan) -> None:
    """Rejects plans that this runtime cannot execute.

    Raises:
      PlanError: A stage is on an unknown host, a device would have to be reached by another device,
        a chain visits the coordinator's host twice, or devices share weights that are not on one
        host.
    """
    for device, chain in enumerate(plan.chains):
        others = sorted(
            {h for h in chain if h not in (COORDINATOR, device_name(device)) and not is_node(h)}
        )
        if others:
            raise PlanError(
                f"device {device} has stages on {', '.join(others)}: a stage runs on the device "
                f"itself, on a compute node (n1, n2, …) or on {COORDINATOR}"
            )
        if chain[0] != device_name(device):
            raise PlanError(
                f"device {device}'s chain begins on {chain[0]}: its samples are on the device, so "
                f"the first stage must be there too"
            )
    met = [
        tuple(sorted(boundary[:2])) for boundary in plan.boundaries() if COORDINATOR in boundary[:2]
    ]
    if len(met) > len(set(met)):
        raise PlanError(
            f"the plan {plan} visits {COORDINATOR} twice in a chain: put the middle stages of a "
            "U-shape on compute nodes"
        )
    if plan.sums_gradients and not any(
        plan.is_colocated(stage) for stage in range(plan.devices[0].stages)
    ):
        raise PlanError(
            f"the plan {plan} shares weights, but no stage serves all devices on one host with "
            "the same cuts: use weights='copy'"
        )
