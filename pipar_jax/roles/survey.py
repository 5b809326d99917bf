"""Surveys the hosts of a run for the tuner: units and links are timed.

The coordinator asks hosts in sequence, so that hosts that share a machine do not disturb each
other; a host remembers earlier answers. With tuner.times=predicted a device times reference
layers alone, and the coordinator predicts its units from them. A link's rate is what the second of
two bundles takes after the first has arrived; its delay is half of the shortest of a few round
trips.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from pipar_jax.config import Config, Hosts
from pipar_jax.config.codec_candidates import candidates_of
from pipar_jax.config.texts import whole_numbers
from pipar_jax.cost_model.costs import LinkModel
from pipar_jax.cost_model.profile import DeviceProfile, HostProfile, NodeProfile, Profile
from pipar_jax.errors import PeerError, PlanError
from pipar_jax.methods.registry import uses_nodes
from pipar_jax.profiling.codec_times import measure_codecs, weight_ratio
from pipar_jax.profiling.predictor.reference import ReferenceTimes
from pipar_jax.profiling.rehearsal import measure_message_s
from pipar_jax.profiling.unit_times import (
    as_configured,
    emulated,
    measure_host,
    measure_reference,
    predicted_host,
    sizes_of,
)
from pipar_jax.protocol import messages
from pipar_jax.protocol.registry import ControlMessage
from pipar_jax.roles.mail import M, Mail
from pipar_jax.roles.membership import Membership
from pipar_jax.roles.replies import reply
from pipar_jax.roles.survey_respondent import two_bundles
from pipar_jax.schedule.plan import COORDINATOR, device_name, long_name, node_name
from pipar_jax.training.compile import TOLD_S, now_and_then
from stages import Model

#: Number of round trips of control messages to measure a link's delay.
ECHOES = 5
#: A transfer shorter than this many seconds is repeated with more bytes, up to a limit.
ENOUGH_S, MOST_BYTES = 0.1, 32 << 20
FIRST_BYTES = 64 << 10


class _AbsentError(PeerError):
    """A host is not there, or was lost while it was asked."""


class Surveyed(NamedTuple):
    """The survey of a run's hosts and links.

    Attributes:
      profile: Hosts and links.
      references: For each host with predicted times, those of the reference layers, emulated
        slowness included.
      devices: What the devices that were there have shown, by name.
    """

    profile: Profile
    references: Mapping[str, ReferenceTimes]
    devices: Mapping[str, DeviceProfile] = MappingProxyType({})


def survey(config: Config, model: Model, members: Membership, samples: Sequence[int]) -> Surveyed:
    """Returns the present profile of a run's hosts and links.

    Args:
      config: Resolved configuration.
      model: The whole model.
      members: The devices, all admitted.
      samples: Samples that each trains on in an epoch.

    Raises:
      PeerError: A device was lost or failed.
    """
    numbers = numbers_of_plans(config, members.hosts)
    sizes = sizes_of(config.tuner.sizes, config.data.batch_size, numbers)
    references: dict[str, ReferenceTimes] = {}
    members.working("tuning")
    if config.tuner.times == "predicted":
        reference = measure_reference(
            config.optimizer, config.aggregation, config.seed, members.poll
        )
        server = predicted_host(config, model, sizes, reference)
        references[COORDINATOR] = emulated(reference, members.hosts[COORDINATOR].slowdown)
    else:
        members.reports.tell_working(COORDINATOR, "timing", 0, 0)
        told = functools.partial(members.reports.tell_working, COORDINATOR, "timing")
        in_turns = not members.hosts[COORDINATOR].slowdown.emulated
        server = measure_host(
            config, model, sizes, members.poll, now_and_then(told, TOLD_S), in_turns
        )
    message_s = measure_message_s()
    found: dict[str, DeviceProfile] = {}
    sampled = members.hosts.sampled  # then any device may take any place, and a few are asked
    there = members.population.present() if sampled else members.hosts.devices
    for name, count in zip(there, samples, strict=False):
        try:
            host = _ask_host(config, sizes, model, members, name, references)
            delay_s = min(_echo_s(members, name) for _ in range(ECHOES)) / 2
            up_bytes_s = _rate(functools.partial(_up_s, members, name))
            down_bytes_s = _rate(functools.partial(_down_s, members, name))
        except _AbsentError:  # it may still come, or come back
            continue
        up = LinkModel(up_bytes_s, delay_s, message_s)
        down = LinkModel(down_bytes_s, delay_s, message_s)
        found[name] = DeviceProfile(host, count, up, down)
    asked_nodes: list[HostProfile | None] = []
    for name in members.hosts.nodes:
        try:
            asked_nodes.append(_ask_host(config, sizes, model, members, name, references))
        except _AbsentError:
            asked_nodes.append(None)
    codecs = measure_codecs(candidates_of(config, model.name), config.aggregation.codec)
    profile = Profile(
        model=model.name,
        batch_size=config.data.batch_size,
        units=server.units,
        server=as_configured(server.host, members.hosts[COORDINATOR]),
        devices=of_places(found, members, samples),
        nodes=_nodes(asked_nodes, members, message_s),
        codecs=codecs,
        window_bytes=config.pipeline.window_mb * 1e6,
        weight_ratio=weight_ratio(config.aggregation.codec, codecs),
        target_bytes=tuple(one.nbytes for one in model.signature.targets.values()),
        side_bytes={name: one.nbytes for name, one in model.signature.sides.items()},
    )
    return Surveyed(profile, references, found)


def numbers_of_plans(config: Config, hosts: Hosts) -> set[int]:
    """Returns the numbers of micro-batches that plans of a run may have; none: any.

    Args:
      config: Resolved configuration.
      hosts: Its hosts.
    """
    if uses_nodes(config.method):  # the chain planner keeps them
        own = {hosts[name].micro_batches for name in hosts.devices}
        return {config.pipeline.micro_batches, *own}
    if config.tuner.select == "paper":
        return set()  # the paper's formula gives any number
    return {1, *whole_numbers(config.tuner.micro_batches)}


def _ask_host(
    config: Config,
    sizes: tuple[int, ...],
    model: Model,
    members: Membership,
    name: str,
    references: dict[str, ReferenceTimes],
) -> HostProfile:
    """Returns the costs of units on a device or node, measured or predicted from references.

    The reference times of a prediction are added to ``references``.
    """
    if config.tuner.times == "predicted":
        told = _ask(members, name, messages.SurveyReference(), messages.Referenced)
        values = dataclasses.asdict(told)
        memory_bytes = values.pop("memory_bytes")
        try:
            reference = ReferenceTimes.from_dict(values)
            host = predicted_host(config, model, sizes, reference).host
        except PlanError as error:
            members.blame(name, f"'referenced' with invalid times: {error}")
            raise _AbsentError(str(error)) from error
        references[name] = reference
        return dataclasses.replace(host, memory_bytes=memory_bytes)
    profiled = _ask(members, name, messages.SurveyProfile(sizes), messages.Profiled)
    host, names = profiled.host, tuple(unit.name for unit in profiled.units)
    if host.sizes != sizes or len(host.update_s) != len(names) or names != model.unit_names:
        members.blame(
            name,
            f"'profiled' of {len(names)} units at sizes {host.sizes}, expected the "
            f"{len(model.units)} units of {model.name} at {sizes}",
        )
        raise _AbsentError(f"{name} sent a profile that is not valid")
    return host


def _ask(members: Membership, name: str, question: ControlMessage, answer: type[M]) -> M:
    """Asks a device or node and waits for its answer."""
    members.send(name, question)
    return _wait_for(members, name, answer).said


def _wait_for(members: Membership, name: str, answer: type[M]) -> Mail[M]:
    """Waits for the answer of a device or node.

    Raises:
      _AbsentError: It is not there, or is lost while it is waited for.
    """
    found = members.collect(answer, (name,))
    if name not in found:
        raise _AbsentError(f"{long_name(name)} was lost while it was asked what it can do")
    return found[name]


def of_places(
    found: Mapping[str, DeviceProfile], members: Membership, samples: Sequence[int]
) -> tuple[DeviceProfile, ...]:
    """Returns the profile of each place's device.

    One that was not there counts as the slowest of the others, with the slowest of their links; so
    do all where any device may take any place.

    Args:
      found: The profiles of those that were there, by name.
      members: The devices and compute nodes.
      samples: Samples of an epoch in each place.

    Raises:
      PeerError: None was there.
    """
    known = list(found.values())
    if not known:
        raise PeerError("no device is left that could be asked what it can do: start them again")
    slowest = DeviceProfile(
        max((profile.host for profile in known), key=_seconds_of),
        0,
        min((profile.up for profile in known), key=_rate_of),
        min((profile.down for profile in known), key=_rate_of),
    )
    own = {} if members.hosts.sampled else found
    return tuple(
        own.get(device_name(place)) or dataclasses.replace(slowest, samples=count)
        for place, count in enumerate(samples)
    )


def _nodes(
    asked: Sequence[HostProfile | None], members: Membership, message_s: float
) -> tuple[NodeProfile, ...]:
    """Returns the profile of each compute node; a lost one counts as the slowest.

    Args:
      asked: The nodes' times; None of one that was lost before it had told them.
      members: The devices and compute nodes.
      message_s: Seconds that a message takes beside its bytes.

    Raises:
      PeerError: All nodes were lost.
    """
    known = [host for host in asked if host is not None]
    if asked and not known:
        raise PeerError("no compute node is left that could be asked what it can do: start them")
    profiles = []
    for number, host in enumerate(asked, 1):
        spec = members.hosts[node_name(number)]
        up, down = (LinkModel.of(shape, message_s) for shape in (spec.up, spec.down))
        if host is None:
            slowest = max(known, key=_seconds_of)
            host = dataclasses.replace(slowest, memory_bytes=spec.memory_bytes)
        profiles.append(NodeProfile(host, up, down))
    return tuple(profiles)


def _seconds_of(host: HostProfile) -> float:
    """Returns the sum of a host's times, to compare hosts by."""
    return sum(map(sum, host.backward_s))


def _rate_of(link: LinkModel) -> float:
    """Returns a link's bytes per second."""
    return math.inf if link.rate_bytes_s is None else link.rate_bytes_s


def _echo_s(members: Membership, name: str) -> float:
    """Returns the seconds of a round trip to a device's thread and back."""
    began_s = time.monotonic()
    _ask(members, name, messages.SurveyEcho(), messages.Echoed)
    return time.monotonic() - began_s


def _rate(transfer_s: Callable[[int], float]) -> float:
    """Returns the bytes per second of a direction, from a transfer that is long enough."""
    nbytes = FIRST_BYTES
    while True:
        seconds = transfer_s(nbytes)
        if seconds >= ENOUGH_S or nbytes >= MOST_BYTES:
            return nbytes / max(seconds, 1e-9)
        nbytes *= 8


def _up_s(members: Membership, name: str, nbytes: int) -> float:
    """Returns the seconds of a transfer of some bytes from a device."""
    members.send(name, messages.SurveySend(nbytes))
    times = []
    for expected in two_bundles(nbytes):
        message = _wait_for(members, name, messages.SurveyBytes).message
        assert message is not None
        sizes = {one: array.nbytes for one, array in message.tensors.items()}
        if sizes != {one: array.nbytes for one, array in expected.items()}:
            members.blame(name, f"'survey_bytes' other than the {nbytes} bytes asked for")
            raise _AbsentError(f"{long_name(name)} sent other bytes than those asked for")
        times.append(message.received_s)
        message.release()
    return times[1] - times[0]


def _down_s(members: Membership, name: str, nbytes: int) -> float:
    """Returns the seconds of a transfer of some bytes to a device."""
    small, large = two_bundles(nbytes)
    members.send_bundle(name, messages.SurveyBytes(), small)
    members.send_bundle(name, messages.SurveyBytes(), large, reply(messages.Took))
    return float(_wait_for(members, name, messages.Took).said.seconds)
