"""Profiles and results of a search as tables."""

from __future__ import annotations

from rich.table import Table

from pipar_jax.config.codec_candidates import CodecCandidates
from pipar_jax.cost_model.costs import LinkModel
from pipar_jax.cost_model.profile import HostProfile, Profile
from pipar_jax.schedule.plan import COORDINATOR, device_name
from pipar_jax.simulator.predict import PlanEstimate, StageCosts, loads
from pipar_jax.tuner import codec_choice
from pipar_jax.tuner.bounds import memory_bytes
from pipar_jax.tuner.plan_labels import labels
from pipar_jax.tuner.search import SearchResult

#: Number of plans shown.
BEST = 6


def plans_table(profile: Profile, result: SearchResult) -> Table:
    """Returns the best plans with their predicted seconds, bottleneck and memory."""
    stages = StageCosts(profile)
    table = Table(title="plans, best first", title_justify="left")
    for name, justify in (
        ("plan", "left"), ("cut", "right"), ("N", "right"), ("dispatch", "left"),
        ("codecs", "left"), ("s/epoch", "right"), ("binds", "left"), ("busy", "right"),
        ("device MB", "right"), ("server MB", "right"),
    ):  # fmt: skip
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    told = list(result.plans[:BEST])
    for judged in result.plans[BEST:]:  # and the best plan of each other method
        if labels(judged.plan)["method"] not in {labels(shown.plan)["method"] for shown in told}:
            told.append(judged)
    for judged in told:
        table.add_row(*_row(stages, judged))
    if result.paper is not None:
        table.add_section()
        method, *rest = _row(stages, result.paper)
        table.add_row(f"paper's {method}", *rest)
    return table


def verdict(result: SearchResult) -> str:
    """Returns a sentence about the optimality of the first plan."""
    looked = f"{result.judged} of {result.candidates} candidates simulated"
    if result.exact:
        return f"{looked}; the others are proven to be no faster"
    return (
        f"{looked}; no plan takes less than {result.bound_s:.4g} s per epoch, so that at most "
        f"{result.gap:.1%} can be gained"
    )


def codecs_table(
    profile: Profile, judged: PlanEstimate, candidates: CodecCandidates
) -> Table | None:
    """Returns the reasons for the codecs of all links; None if there was no choice.

    Args:
      profile: The profile of hosts and links.
      judged: The chosen plan.
      candidates: The codecs to choose from.
    """
    why = codec_choice.reasons(StageCosts(profile), candidates, judged)
    if not why:
        return None
    title = "codecs of the best plan, times per full mini-batch"
    if candidates.by_bits:
        title += f"; as many bits as cost no more than {codec_choice.SLACK:.0%} of the epoch"
    table = Table(title=title, title_justify="left")
    for name, justify in (
        ("link", "left"), ("cut", "right"), ("tensor", "left"), ("raw kB", "right"),
        ("codec", "left"), ("against", "left"), ("saves ms", "right"), ("coding ms", "right"),
        ("why", "left"),
    ):  # fmt: skip
        table.add_column(name, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for reason in why:
        plan, slot = judged.plan, reason.slot
        ends = zip(*(slot.ends(plan, device) for device in slot.devices), strict=True)
        sender, receiver = (_names(list(dict.fromkeys(hosts))) for hosts in ends)
        table.add_row(
            f"{sender} → {receiver}", str(plan.devices[slot.devices[0]].cuts[slot.boundary]),
            slot.role, f"{reason.raw_bytes / 1e3:,.0f}", reason.chosen, reason.other,
            f"{reason.saved_s * 1e3:,.1f}", f"{reason.coding_s * 1e3:,.1f}", reason.words(),
        )  # fmt: skip
    return table


def binds(stages: StageCosts, judged: PlanEstimate) -> tuple[str, float]:
    """Returns the busiest resource of a round, and its busy share.

    If no resource is busy for half of the round, hosts wait for each other: ``waiting``.
    """
    busy = loads(stages, judged)
    name = max(busy, key=lambda host: busy[host])
    return (name if busy[name] >= 0.5 else "waiting"), busy[name]


def units_tables(profile: Profile) -> list[Table]:
    """Returns the sizes of units, and their milliseconds on each distinct host."""
    facts = Table(title=f"{profile.model}: units", title_justify="left")
    facts.add_column("unit")
    for name in ("weights kB", "optimiser kB", "out kB/sample", "kept kB/sample"):
        facts.add_column(name, justify="right")
    for unit in profile.units:
        sizes = (
            unit.parameter_bytes, unit.optimizer_bytes, unit.output_bytes, unit.residual_bytes,
        )  # fmt: skip
        facts.add_row(unit.name, *(f"{nbytes / 1e3:,.2f}" for nbytes in sizes))
    return [facts, *(_times(profile, host, names) for host, names in _distinct(profile).items())]


def _times(profile: Profile, host: HostProfile, names: str) -> Table:
    """Returns a host's milliseconds; the last unit's backward includes its forward."""
    added = (
        f"; in a run each computation takes {1e3 * host.handling.call_s:.3g} more, and "
        f"{1e9 * host.handling.byte_s:.3g} per MB of its messages"
    )
    table = Table(
        title=f"{names}: milliseconds by samples{added if host.handling.call_s else ''}",
        title_justify="left",
    )
    table.add_column("unit")
    for kind in ("forward", "backward"):
        for size in host.sizes:
            table.add_column(f"{kind} {size}", justify="right")
    table.add_column("update", justify="right")
    for i, unit in enumerate(profile.units):
        times = (*host.forward_s[i], *host.backward_s[i], host.update_s[i])
        table.add_row(unit.name, *(f"{seconds * 1e3:,.3f}" for seconds in times))
    return table


def links_table(profile: Profile) -> Table:
    """Returns each distinct link's rate, delay and cost per message in both directions."""
    table = Table(title="links", title_justify="left")
    table.add_column("devices")
    for way in ("up", "down"):
        for name in ("Mbit/s", "delay ms", "message ms"):
            table.add_column(f"{way} {name}", justify="right")
    links: dict[tuple[LinkModel, LinkModel], list[str]] = {}
    for index, device in enumerate(profile.devices):
        links.setdefault((device.up, device.down), []).append(device_name(index))
    for (up, down), names in links.items():
        table.add_row(_names(names), *_link(up), *_link(down))
    return table


def _row(stages: StageCosts, judged: PlanEstimate) -> list[str]:
    """Returns the cells of a plan's row."""
    what = labels(judged.plan)
    memory = memory_bytes(stages, judged.plan)
    server = memory.pop(COORDINATOR)
    pairs = {
        f"{pair.activation}/{pair.cotangent}"
        for device in judged.plan.devices
        for pair in device.codecs
    }
    name, share = binds(stages, judged)
    return [
        what["method"], what["cut"], what["N"], judged.plan.dispatch, ", ".join(sorted(pairs)),
        f"{judged.epoch_s:.4g}", name, f"{share:.0%}",
        f"{max(memory.values()) / 1e6:,.1f}", f"{server / 1e6:,.1f}",
    ]  # fmt: skip


def _distinct(profile: Profile) -> dict[HostProfile, str]:
    """Returns each distinct host with the names of all equal hosts."""
    alike: dict[HostProfile, list[str]] = {profile.server: [COORDINATOR]}
    for index, device in enumerate(profile.devices):
        alike.setdefault(device.host, []).append(device_name(index))
    return {host: _names(names) for host, names in alike.items()}


def _names(names: list[str]) -> str:
    return ", ".join(names) if len(names) < 4 else f"{names[0]}, {names[1]} … {names[-1]}"


def _link(link: LinkModel) -> tuple[str, str, str]:
    rate = "unlimited" if link.rate_bytes_s is None else f"{link.rate_bytes_s * 8 / 1e6:.1f}"
    return rate, f"{link.delay_s * 1e3:.2f}", f"{link.message_s * 1e3:.3f}"
