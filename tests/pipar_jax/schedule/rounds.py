"""Plans of every form, and rounds of them."""

from __future__ import annotations

from pipar_jax.schedule.plan import DevicePlan, Plan
from pipar_jax.schedule.rounds import RoundSchedule, rounds

TWO = DevicePlan((1,), ("device", "server"), 3)
U_SHAPE = DevicePlan((1, 3, 4), ("device", "n1", "n2", "device"), 2)


def plan(device: DevicePlan = TWO, count: int = 2, **values: object) -> Plan:
    return Plan((device,) * count, **values)  # type: ignore[arg-type]


def schedule(one: Plan, steps=(2, 3), samples=(10, 15), batch=5, index=0) -> RoundSchedule:
    return RoundSchedule(one, rounds(one, steps, 2)[index], samples, batch)


PLANS = [
    plan(DevicePlan((), ("device",))),
    plan(),
    plan(aggregate_every=1),
    plan(U_SHAPE),
    plan(order="sequential", weights="shared"),
    plan(order="sequential", weights="shared", hand_on="step"),
    Plan((TWO, DevicePlan((2,), ("device", "server"), 2))),
]
