"""Conducts a change of plan: asks hosts for what leaves them, and hands on what they gain."""

from __future__ import annotations

from typing import Any

from pipar_jax.plan import COORDINATOR, Plan, device_name
from pipar_jax.runtime import bundle, migration
from pipar_jax.runtime.host import Host
from pipar_jax.runtime.members import Mail, Members
from stages import Model


def conduct(
    members: Members,
    host: Host,
    model: Model,
    old: Plan,
    new: Plan,
    variables: tuple[dict[str, Any], dict[str, Any]],
) -> None:
    """Lets all hosts change their plan; runs on the coordinator, between two rounds.

    Args:
      members: The devices.
      host: The host in this process.
      model: The whole model.
      old: The plan so far.
      new: The plan from now on.
      variables: The global weights and batch statistics by unit.

    Raises:
      PeerError: A device was lost or failed.
      RunError: This process failed.
    """
    devices = tuple(device_name(i) for i in range(len(new.devices)))
    members.broadcast({"type": "give", "plan": new.to_dict()})
    host.give(new)
    opt: dict[str, Any] = {}
    for name, mail in members.collect("given", (COORDINATOR, *devices)).items():
        for device, parts in _given(name, mail).items():
            opt.setdefault(device, {}).update(parts.get("opt", {}))
    params, state = variables
    arrived: dict[str, dict[str, Any]] = {name: {} for name in (COORDINATOR, *devices)}
    for one in migration.moves(old, new, len(model.units)):
        unit, device = model.unit_names[one.unit], str(one.device)
        parts = arrived[one.target].setdefault(device, {"params": {}, "state": {}, "opt": {}})
        parts["params"][unit], parts["state"][unit] = params[unit], state[unit]
        parts["opt"][unit] = opt.get(device, {}).get(unit, ())
    for name in devices:
        body = {"type": "adopt", "plan": new.to_dict()}
        members.send_bundle(name, "adopt", bundle.pack(arrived[name]), body)
    host.adopt(new, arrived[COORDINATOR])
    members.collect("adopted", (COORDINATOR, *devices))


def _given(name: str, mail: Mail) -> dict[str, Any]:
    """Returns the optimiser states that a host gave."""
    if mail.message is None:
        return mail.arrays
    return bundle.unpack(mail.message.tensors, name) if mail.message.kind == "bundle" else {}
