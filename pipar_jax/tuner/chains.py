"""The best chain over a profile's nodes: the chain planner proposes, the simulator evaluates.

The planner's optima are exact for its objectives, including codecs. The simulator chooses among the
best dozen chains of each objective; then codecs of the chosen chain are changed one at a time as
long as it becomes faster. The result is the best of the evaluated chains; its optimality is not
proven.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Collection, Iterator, Mapping

from rich.table import Table

from pipar_jax.config import Config
from pipar_jax.config.codec_candidates import ROLES, CodecCandidates
from pipar_jax.cost_model.profile import CodecProfile, HostProfile, Profile, interpolate
from pipar_jax.errors import PlanError
from pipar_jax.methods.plans import plan_of_chain
from pipar_jax.methods.registry import METHODS, Method, hosts_of
from pipar_jax.schedule.actions import micro_batch_sizes
from pipar_jax.schedule.plan import OWNER, Codecs, Plan, WeightPolicy, node_name
from pipar_jax.simulator.predict import PlanEstimate, StageCosts, estimate
from pipar_jax.tuner import codec_choice
from pipar_jax.tuner.bounds import excess, kept_in
from pipar_jax.tuner.chain_search import (
    ChainPlan,
    ChainProblem,
    Coding,
    DataOwner,
    Layer,
    Node,
    Objective,
    plan_chain,
)

#: Objectives whose optima are evaluated; only the published one with ``tuner.select=paper``.
OBJECTIVES: tuple[Objective, ...] = ("step", "steady", "accept", "mpsl")
#: Maximum number of units on the devices at either end of the model with ``mpsl``; with ``accept``,
#: where the device is a peer, there is no limit.
KEPT = 4
#: Number of the planner's best proposals that the simulator evaluates, and their maximum cost
#: relative to the best.
JUDGED, NEAR = 12, 1.5
#: Shares of the nodes' memory given to the planner, in turn, while all its proposals exceed the
#: memory: the planner counts only weights and activations.
ROOM = (1.0, 0.8, 0.6, 0.4)


def tune_chain(
    profile: Profile,
    config: Config,
    objection: Callable[[Plan], str | None] | None = None,
    nodes: Collection[str] | None = None,
) -> PlanEstimate:
    """Returns the best chain for ``method=mpsl`` or ``accept``, with its predicted times.

    The chain planner finds the optimum of each objective for each number of units on the devices;
    the simulator, which models micro-batches, credits and aggregation, decides. Micro-batches and
    weights are those of the configuration. So are codecs, unless ``tuner.codecs`` is auto or a
    list: then each boundary has its own codec in each direction, the fastest, with as many bits as
    cost no time. The published objective ignores codecs.

    Args:
      profile: The profile of hosts and links.
      config: Resolved configuration.
      objection: Returns why a plan is not possible, or None; unless it is given, a plan is not
        possible that exceeds a host's memory.
      nodes: Names of the nodes that may have stages; None: all of the profile's.

    Raises:
      ConfigError: The profile lacks a candidate codec.
      PlanError: No chain fits into the nodes' memory, or none is possible.
    """
    if config.tuner.select == "paper":
        config = dataclasses.replace(config, tuner=dataclasses.replace(config.tuner, codecs=""))
    candidates = codec_choice.candidates_for(config, profile)
    codec_choice.check_measured(candidates, profile)
    stages = StageCosts(profile)
    if objection is None:
        objection = functools.partial(
            excess, stages, keeps=kept_in(hosts_of(config), config.cohort)
        )
    make = functools.partial(plan_of_chain, config)
    method = METHODS[config.method]
    proposals = _proposals(profile, method, candidates, make, objection, nodes)
    judged = {plan: estimate(stages, plan) for plan in proposals}
    fastest = min(judged.values(), key=lambda candidate: candidate.epoch_s)
    if not candidates.chosen:
        return fastest
    actions = max(
        config.tuner.actions, sum(candidate.round.simulated for candidate in judged.values())
    )
    return with_codecs(stages, candidates, make, actions, judged, fastest.plan)


def with_codecs(
    stages: StageCosts,
    candidates: CodecCandidates,
    make: Callable[..., Plan],
    actions: int,
    judged: dict[Plan, PlanEstimate],
    plan: Plan,
) -> PlanEstimate:
    """Returns a chain with the best codecs for each of its boundaries.

    Args:
      stages: Times and bytes.
      candidates: The codecs to choose from.
      make: Returns the plan of cuts, hosts and codecs.
      actions: Most actions that are simulated.
      judged: The evaluated plans; extended.
      plan: The chain, as the planner proposed it.
    """
    left = actions

    def seconds(plan: Plan) -> float | None:
        nonlocal left
        if plan not in judged:
            if left <= 0:
                return None
            judged[plan] = estimate(stages, plan)
            left -= judged[plan].round.simulated
        return judged[plan].epoch_s

    chain = plan.devices[0]
    for pair in candidates.pairs():  # links may wait for each other: changing one has no effect
        seconds(make(chain.cuts, chain.hosts, (pair,) * len(chain.cuts)))
    same = chain.cuts, chain.hosts
    alike = (plan for plan in judged if (plan.devices[0].cuts, plan.devices[0].hosts) == same)
    plan = min(alike, key=lambda plan: judged[plan].epoch_s)
    slots = list(codec_choice.slots(plan, stages.profile))
    plan = codec_choice.speed_up(plan, slots, candidates, seconds)
    return judged[codec_choice.raise_precision(plan, slots, candidates, seconds)]


def chain_table(profile: Profile, judged: Mapping[str, PlanEstimate]) -> Table:
    """Returns a table of chains with their predicted seconds and each host's share.

    Args:
      profile: The profile of hosts and links.
      judged: The chains, keyed by the criterion by which they are best.
    """
    table = Table(title="chains", title_justify="left")
    for name, justify in (("best by", "left"), ("plan", "left"), ("s/epoch", "right"),
                          ("host: units, busy", "left")):  # fmt: skip
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for name, predicted in judged.items():
        plan, count = predicted.plan, len(profile.units)
        hosts = []
        for stage in range(plan.devices[0].stages):
            units = plan.units(0, stage, count)
            host = plan.host(0, stage)
            busy = predicted.round.busy_s[host] / predicted.round.seconds
            label = "device" if plan.devices[0].hosts[stage] == OWNER else host
            hosts.append(f"{label}: {units.start}:{units.stop}, {busy:.0%}")
        texts = dict.fromkeys(map(str, plan.devices))  # devices may differ in codecs
        table.add_row(name, "\n".join(texts), f"{predicted.epoch_s:.4g}", "\n".join(hosts))
    return table


def _proposals(
    profile: Profile,
    method: Method,
    candidates: CodecCandidates,
    build: Callable[[tuple[int, ...], tuple[str, ...], tuple[Codecs, ...]], Plan],
    objection: Callable[[Plan], str | None],
    usable: Collection[str] | None,
) -> dict[Plan, None]:
    """Returns the planner's best possible chains by each objective.

    Raises:
      PlanError: There is none.
    """
    reason, least = "", 3 if method.keeps_labels(candidates.pipeline) else 2
    if len(profile.units) < least:
        reason = (
            f"the model has {len(profile.units)} units, and a chain at least {least} stages: "
            "divide the model into more units, or use another method"
        )
    limited = any(node.host.memory_bytes for node in profile.nodes)
    for share in ROOM if limited else ROOM[:1]:
        proposals: dict[Plan, None] = {}
        for objective in ("mpsl",) if candidates.tuner.select == "paper" else OBJECTIVES:
            best: dict[Plan, float] = {}  # the best so far
            for problem in _problems(profile, method, candidates, share, usable):
                most_s = NEAR * min(best.values(), default=math.inf)
                if len(best) == JUDGED:
                    most_s = min(most_s, max(best.values()))
                try:
                    chain = plan_chain(problem, objective, most_s)
                except PlanError as error:
                    reason = reason or str(error)
                    continue
                plan = build(*_shape(problem, chain, len(profile.units)))
                if (why := objection(plan)) is None:
                    best[plan] = chain.cost_s
                else:
                    reason = why
                if len(best) > JUDGED:
                    del best[max(best, key=best.__getitem__)]
            proposals |= dict.fromkeys(sorted(best, key=best.__getitem__))
        if proposals:
            return proposals
    raise PlanError(f"no chain over the compute nodes can be planned: {reason}")


def _problems(
    profile: Profile,
    method: Method,
    candidates: CodecCandidates,
    share: float,
    usable: Collection[str] | None,
) -> Iterator[ChainProblem]:
    """Yields the planner's problem for each choice of the units on the devices.

    Args:
      profile: The profile of hosts and links.
      method: The method, whose last stage may be the device's.
      candidates: The codecs to choose from.
      share: Usable share of the nodes' memory.
      usable: Names of the nodes that may have stages; None: all.
    """
    pipeline = candidates.pipeline
    sizes = micro_batch_sizes(profile.batch_size, pipeline.micro_batches)
    size, parts = sizes[0], len(sizes)
    device, count = profile.devices[0], len(profile.units)
    home = method.keeps_labels(pipeline)
    owner = DataOwner(_layers(profile, device.host, size, parts), device.up, device.down)
    nodes = tuple(
        Node(
            node_name(i + 1),
            _layers(profile, node.host, size, parts),
            memory_bytes=share * (node.host.memory_bytes or float("inf")),
            up=node.up,
            down=node.down,
        )
        for i, node in enumerate(profile.nodes)
        if usable is None or node_name(i + 1) in usable
    )
    activation_codings, cotangent_codings = (
        tuple(_coding(profile, name) for name in candidates.allowed(role)) for role in ROLES
    )
    most = count - 1 if method.one_device else min(KEPT, count - 1)
    for first in range(1, most + 1):
        stops = range(max(first + 1, count - KEPT), count) if home else (count,)
        for stop in stops:
            if first < stop:
                yield ChainProblem(
                    nodes, first, stop, len(profile.devices), owner,
                    micro_batches=parts, shared=pipeline.weights == WeightPolicy.SHARED,
                    in_flight=-(-pipeline.in_flight // parts),
                    activation_codings=activation_codings, cotangent_codings=cotangent_codings,
                )  # fmt: skip


def _shape(
    problem: ChainProblem, chain: ChainPlan, units: int
) -> tuple[tuple[int, ...], tuple[str, ...], tuple[Codecs, ...]]:
    """Returns the cuts, hosts and codecs of a chain that the planner found."""
    home = problem.stop < units
    hosts = (OWNER, *(stage.node for stage in chain.stages), *((OWNER,) if home else ()))
    cuts = [stage.first for stage in chain.stages]
    if home:
        cuts.append(problem.stop)
    codecs = tuple(
        Codecs(pair.activation.codec, pair.cotangent.codec)
        for pair in chain.pairs[: len(cuts)]  # labels at the end: none crosses the last
    )
    return tuple(cuts), hosts, codecs


def _coding(profile: Profile, name: str) -> Coding:
    """Returns the cost of a codec for the planner."""
    codec = profile.codecs.get(name, CodecProfile())
    return Coding(name, codec.ratio, codec.encode_s_per_byte + codec.decode_s_per_byte)


def _layers(profile: Profile, host: HostProfile, size: int, parts: int) -> tuple[Layer, ...]:
    """Returns the cost of each unit on a host for a mini-batch in micro-batches of a size."""
    return tuple(
        Layer(
            parts * interpolate(host.sizes, forward, size),
            parts * interpolate(host.sizes, backward, size) + update_s,
            unit.output_bytes * profile.batch_size,
            unit.parameter_bytes,
        )
        for unit, forward, backward, update_s in zip(
            profile.units, host.forward_s, host.backward_s, host.update_s, strict=True
        )
    )
