"""Predicts the time of a plan from a profile: stage times, costs, simulation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from comms.wire.frame import HEADER_BYTES
from pipar_jax.cost_model.costs import links_of_plan
from pipar_jax.cost_model.profile import CodecProfile, HostProfile, Profile, interpolate
from pipar_jax.schedule.actions import (
    AGGREGATE,
    ALL,
    BACKWARD,
    FORWARD,
    LOSS,
    RECEIVE_BACKWARD,
    SEND_BACKWARD,
    SEND_CLIENT_MODEL,
    SEND_FORWARD,
    UPDATE,
    ActionKind,
)
from pipar_jax.schedule.host_program import Beside, find_beside
from pipar_jax.schedule.plan import COORDINATOR, Order, Plan, device_name, is_node, node_name
from pipar_jax.schedule.rounds import RoundSchedule, rounds
from pipar_jax.schedule.trace import Trace
from pipar_jax.simulator import Costs, LinkModel, Prediction
from pipar_jax.simulator import simulate as simulate_round

_RAW = CodecProfile()


class HostTimes:
    """The seconds of any run of units on one host, by prefix sums cached by size.

    Attributes:
      handling: Overhead of a run per computation.
      rests: Whether it is known what a rest of the processor costs.

    Args:
      host: The host's profile.
    """

    def __init__(self, host: HostProfile) -> None:
        self._host = host
        self.handling = host.handling
        self.rests = bool(host.after_rest_s)
        self._sums: dict[tuple[str, int], list[float]] = {}

    def time_s(self, kind: ActionKind, first: int, stop: int, samples: int) -> float:
        """Returns the seconds of a stage's computation in a run.

        Args:
          kind: F, B, L (forward and backward in one) or U.
          first: The stage's first unit.
          stop: One past its last.
          samples: Samples in the micro-batch; 0 for an update.
        """
        if kind == LOSS:
            sums_s = self._sum(FORWARD, first, stop, samples)
            sums_s += self._sum(BACKWARD, first, stop, samples)
            calls = 2 * (stop - first) - 1  # the last unit is one call, all others two
        else:
            sums_s, calls = self._sum(kind, first, stop, samples), stop - first
        # Units were measured with one call each; the stage is called once.
        alone_s = max(sums_s - (calls - 1) * self._host.call_s, 0.1 * sums_s)
        return alone_s if kind == UPDATE else alone_s + self.handling.call_s

    def after_rest_s(self, kind: ActionKind, first: int, stop: int) -> float:
        """Returns the seconds that a stage's computation takes more after a rest.

        Args:
          kind: F, B, L or U.
          first: The stage's first unit.
          stop: One past its last.
        """
        rows = self._host.after_rest_s[first:stop]
        if kind == LOSS:
            return sum(forward + backward for forward, backward, _ in rows)
        return sum(row[(FORWARD, BACKWARD, UPDATE).index(kind)] for row in rows)

    def _sum(self, kind: ActionKind, first: int, stop: int, samples: int) -> float:
        sums = self._sums.get((kind, samples))
        if sums is None:
            host = self._host
            if kind == UPDATE:
                values = list(host.update_s)
            else:
                table = host.forward_s if kind == FORWARD else host.backward_s
                values = [interpolate(host.sizes, row, samples) for row in table]
            sums = [0.0]
            for value in values:
                sums.append(sums[-1] + value)
            self._sums[kind, samples] = sums
        return sums[stop] - sums[first]


class StageCosts:
    """The times and bytes of all possible stages of a profile.

    Attributes:
      profile: The profile.
      server: Times on the server.
      devices: Times on each device; equal devices share one object.
      nodes: Times on each compute node, by name.

    Args:
      profile: The profile.
    """

    def __init__(self, profile: Profile) -> None:
        self.profile = profile
        known: dict[HostProfile, HostTimes] = {}
        self.server = HostTimes(profile.server)
        self.devices = [
            known.setdefault(device.host, HostTimes(device.host)) for device in profile.devices
        ]
        self.nodes = {
            node_name(i + 1): known.setdefault(node.host, HostTimes(node.host))
            for i, node in enumerate(profile.nodes)
        }
        self._weights = [0.0]
        self._optimizer = [0.0]
        for unit in profile.units:
            shared = unit.parameter_bytes - unit.personal_bytes
            self._weights.append(self._weights[-1] + shared + unit.state_bytes)
            self._optimizer.append(self._optimizer[-1] + unit.optimizer_bytes)

    def weight_bytes(self, first: int, stop: int) -> float:
        """Returns the bytes of a stage's weights, without personal ones, and statistics."""
        return self._weights[stop] - self._weights[first]

    def averaged_bytes(self, first: int, stop: int) -> float:
        """Returns the bytes of a stage's weights on the wire for aggregation."""
        return self.weight_bytes(first, stop) * self.profile.weight_ratio

    def part_bytes(self, first: int, stop: int) -> float:
        """Returns the bytes of a hand-over: weights, statistics and optimiser state of a stage."""
        return self.weight_bytes(first, stop) + self._optimizer[stop] - self._optimizer[first]

    def average_s(self) -> float:
        """Returns the seconds in which the coordinator averages the devices' weights."""
        per_byte = self.profile.server.average_s_per_byte
        return per_byte * self._weights[-1] * len(self.profile.devices)

    def cut_bytes(self, cut: int, samples: int) -> float:
        """Returns the bytes of the activation, and of the cotangent, at a cut, before coding."""
        return self.profile.units[cut - 1].output_bytes * samples

    def up_bytes(self, cut: int, samples: int, codec: str, beside: Beside | None = None) -> float:
        """Returns the bytes of a micro-batch's activation, targets and side inputs on the wire.

        Args:
          cut: The cut.
          samples: Samples in the micro-batch.
          codec: Codec of the activation.
          beside: What crosses with it; None: all that units above the cut need.
        """
        if beside is None:
            above = self.profile.units[cut:]
            beside = Beside(True, tuple(sorted({name for unit in above for name in unit.sides})))
        crossing = [self.profile.side_bytes[name] for name in beside.sides]
        crossing += self.profile.target_bytes if beside.targets else ()
        payload = self.cut_bytes(cut, samples) * self.codec(codec).ratio
        return payload + sum(crossing) * samples + (1 + len(crossing)) * HEADER_BYTES

    def down_bytes(self, cut: int, samples: int, codec: str) -> float:
        """Returns the bytes of a micro-batch's cotangent on the wire."""
        return self.cut_bytes(cut, samples) * self.codec(codec).ratio + HEADER_BYTES

    def codec(self, name: str) -> CodecProfile:
        """Returns ratio and speed of a codec; ``raw`` has no cost."""
        return self.profile.codecs.get(name, _RAW)

    def costs(self, plan: Plan) -> Costs:
        """Returns the costs for the simulator."""
        count = len(self.profile.units)
        bounds = [(0, *device.cuts, count) for device in plan.devices]
        sides = [unit.sides for unit in self.profile.units]

        def compute_s(device: int, stage: int, kind: ActionKind, samples: int) -> float:
            device = 0 if device == ALL else device
            name = plan.host(device, stage)
            first, stop = bounds[device][stage : stage + 2]
            if kind == AGGREGATE:
                if not is_node(name):
                    return self.average_s()
                per_byte = self.profile.of(name).host.average_s_per_byte
                return per_byte * self.weight_bytes(first, stop) * len(plan.devices)
            times = self.times(name, device)
            seconds = times.time_s(kind, first, stop, samples)
            if kind == UPDATE or not times.handling.byte_s:
                return seconds
            # Bytes at the cuts on both sides; the last stage has one cut.
            around = (stage - 1, stage - 1 if kind == LOSS else stage)
            crossed = [
                plan.devices[device].cuts[below]
                for below in around
                if 0 <= below < len(plan.devices[device].cuts)
                and plan.host(device, below) != plan.host(device, below + 1)
            ]
            nbytes = sum(self.cut_bytes(cut, samples) for cut in crossed)
            return seconds + times.handling.byte_s * nbytes

        def wire_bytes(device: int, stage: int, kind: ActionKind, samples: int) -> float:
            chain = plan.devices[device]
            if kind == SEND_FORWARD:
                codec = chain.codecs[stage].activation
                beside = find_beside(plan, device, stage, sides)
                return self.up_bytes(chain.cuts[stage], samples, codec, beside)
            if kind == SEND_BACKWARD:
                codec = chain.codecs[stage - 1].cotangent
                return self.down_bytes(chain.cuts[stage - 1], samples, codec)
            first, stop = bounds[device][stage : stage + 2]
            if kind == SEND_CLIENT_MODEL:
                return self.part_bytes(first, stop)
            return self.averaged_bytes(first, stop)

        def codec_s(device: int, stage: int, kind: ActionKind, samples: int) -> float:
            # A send names the sending stage, a receive the receiving one.
            back = kind in (SEND_BACKWARD, RECEIVE_BACKWARD)
            boundary = stage if kind in (SEND_FORWARD, RECEIVE_BACKWARD) else stage - 1
            pair = plan.devices[device].codecs[boundary]
            codec = self.codec(pair.cotangent if back else pair.activation)
            sends = kind in (SEND_FORWARD, SEND_BACKWARD)
            per_byte = codec.encode_s_per_byte if sends else codec.decode_s_per_byte
            return per_byte * self.cut_bytes(plan.devices[device].cuts[boundary], samples)

        def after_rest_s(device: int, stage: int, kind: ActionKind, samples: int) -> float:
            del samples
            device = 0 if device == ALL else device
            first, stop = bounds[device][stage : stage + 2]
            return self.times(plan.host(device, stage), device).after_rest_s(kind, first, stop)

        coded = any(pair.activation != "raw" or pair.cotangent != "raw"
                    for device in plan.devices for pair in device.codecs)  # fmt: skip
        rests = any(times.rests for times in (self.server, *self.devices, *self.nodes.values()))
        return Costs(compute_s, wire_bytes, self.links(plan),
                     window_bytes=self.profile.window_bytes,
                     codec_s=codec_s if coded else None,
                     after_rest_s=after_rest_s if rests else None)  # fmt: skip

    def times(self, host: str, device: int) -> HostTimes:
        """Returns the times of a host in a device's chain."""
        if host == COORDINATOR:
            return self.server
        return self.nodes[host] if is_node(host) else self.devices[device]

    def links(self, plan: Plan) -> dict[tuple[str, str], LinkModel]:
        """Returns the model of every direction of every link that a plan uses."""

        def ends(host: str) -> tuple[LinkModel, LinkModel]:
            one = self.profile.of(host)
            return one.up, one.down

        return links_of_plan(plan, ends)


class PlanEstimate(NamedTuple):
    """A plan with its predicted times.

    Attributes:
      plan: The plan.
      epoch_s: Predicted seconds of an epoch: rounds, aggregation included.
      round: The prediction of one round.
    """

    plan: Plan
    epoch_s: float
    round: Prediction


def round_of(profile: Profile, plan: Plan) -> RoundSchedule:
    """Returns the first round of a plan on a profile's devices.

    In sequential order the last device has the client-side model, as at the start of later rounds.
    """
    samples = tuple(device.samples for device in profile.devices)
    steps = [profile.steps(device) for device in range(len(samples))]
    holder = len(samples) - 1 if plan.order == Order.SEQUENTIAL else None
    return RoundSchedule(plan, rounds(plan, steps, 1)[0], samples, profile.batch_size, holder)


def rounds_per_epoch(profile: Profile, plan: Plan) -> float:
    """Returns the number of rounds per epoch, each as long as the first."""
    if plan.order == Order.SEQUENTIAL or not plan.aggregate_every:
        return 1.0
    return max(1.0, max(map(profile.steps, range(len(profile.devices)))) / plan.aggregate_every)


def estimate(stages: StageCosts, plan: Plan) -> PlanEstimate:
    """Predicts a plan's epoch by simulating a round of it.

    Args:
      stages: Times and bytes.
      plan: The plan.

    Raises:
      ScheduleError: The plan deadlocks.
    """
    simulated = simulate_round(round_of(stages.profile, plan), stages.costs(plan), collect=False)
    return PlanEstimate(plan, simulated.seconds * rounds_per_epoch(stages.profile, plan), simulated)


def simulate(plan: Plan, profile: Profile) -> Trace:
    """Returns the predicted trace of a plan's first round on a profile's hosts.

    Args:
      plan: The plan.
      profile: The profile of hosts and links.

    Raises:
      ScheduleError: The plan deadlocks.
    """
    costs = StageCosts(profile).costs(plan)
    return simulate_round(round_of(profile, plan), costs).trace


def loads(stages: StageCosts, judged: PlanEstimate) -> Mapping[str, float]:
    """Returns the busy shares of the busiest device, uplink, downlink and the server, in [0, 1]."""
    simulated, busiest = judged.round, {"device": 0.0, "uplink": 0.0, "downlink": 0.0}
    for index, device in enumerate(stages.profile.devices):
        name = device_name(index)
        busiest["device"] = max(busiest["device"], simulated.busy_s[name])
        for way, ends, link in (
            ("uplink", (name, COORDINATOR), device.up),
            ("downlink", (COORDINATOR, name), device.down),
        ):
            carried = simulated.carried_bytes.get(ends, 0.0)
            if carried and link.rate_bytes_s:
                busiest[way] = max(busiest[way], carried / link.rate_bytes_s)
    busiest["server"] = simulated.busy_s[COORDINATOR]
    return {name: min(seconds / simulated.seconds, 1.0) for name, seconds in busiest.items()}
