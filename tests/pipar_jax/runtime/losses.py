"""Hosts of a run in one process, joined by links of memory, and a coordinator that loses devices.

Nothing of it waits for a clock: a device is lost at the tensor that a test names.
"""

from __future__ import annotations

import dataclasses
import queue
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np

from comms import Message, PeerLost, Tag
from pipar_jax.aggregation.aggregator import Aggregator, Contribution
from pipar_jax.config import Config
from pipar_jax.data.loader import Loader
from pipar_jax.protocol import messages
from pipar_jax.runtime import exchanges, memory, unit_state
from pipar_jax.runtime.host import Host
from pipar_jax.runtime.link_table import direct
from pipar_jax.runtime.unit_state import States
from pipar_jax.schedule.actions import ALL, Span
from pipar_jax.schedule.plan import COORDINATOR, Plan, device_name
from pipar_jax.schedule.rounds import RoundSchedule
from tests.pipar_jax.roles import fakes
from tests.pipar_jax.runtime import support

PATIENCE_S = 120.0


@dataclasses.dataclass(frozen=True)
class Loss:
    """When a device is lost.

    Attributes:
      place: Whose.
      round: In which round.
      tensor: Returns of each tensor that it sends or is sent whether it is lost right before; None:
        it is lost once all hosts have trained, before the commit.
      late: It lives, and only its tensors come too late: it goes on in the next round.
    """

    place: int
    round: int
    tensor: Callable[[Tag], bool] | None
    late: bool = False


class Wire:
    """One direction between two hosts."""

    def __init__(self, world: World, source: str, target: str) -> None:
        self.peer, self.error, self._world = target, None, world
        self._source, self._target = source, target

    available_bytes = 1 << 30

    def can_send(self, nbytes: float) -> bool:
        return True

    def send(self, tag: Tag, array: Any, *, codec: str = "raw", on_sent: Any = None) -> None:
        if self._world.carry(self._source, self._target, tag, np.array(array)) and on_sent:
            on_sent(0.0, 0.0, array.nbytes)


class World:
    """All hosts of a plan.

    Attributes:
      said: What hosts have answered, and ("lost", place).
      gone: Hosts whose process is gone.
    """

    def __init__(self, made: Config, plan: Plan, network: Any, samples: Sequence[int]) -> None:
        self.config, self.plan, self.samples = made, plan, tuple(samples)
        self.network = network
        self.said: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.gone: set[str] = set()
        self.held: list[Any] = []  # tensors that nobody has given back
        self._loss: Loss | None = None
        self._late: list[tuple[str, Any]] = []
        data = support.datasets(self.samples)
        self.hosts: dict[str, Host] = {}
        for name in plan.hosts():
            loader = None
            if name[0] == "d":
                index = int(name[1:])
                loader = Loader(data[index].train, None, made.data.batch_size, seed=made.seed,
                                device=index)  # fmt: skip
            self.hosts[name] = Host(
                name, network, made, batches=None if loader is None else Batches(loader),
                reply=lambda said, arrays, name=name: self.said.put((name, said, arrays)),
                failed=lambda error: self.said.put(("", error, {})),
            )  # fmt: skip
        for name, host in self.hosts.items():
            for peer in self.hosts:
                if COORDINATOR in (name, peer) and name != peer:
                    host.link_table.control[peer] = Wire(self, name, peer)
            for boundary in direct(plan.boundaries()):
                if name in boundary[:2]:
                    host.link_table.add(boundary, Wire(self, name, boundary.peer(name)))

    def __enter__(self) -> World:
        return self

    def __exit__(self, *error: object) -> None:
        for host in self.hosts.values():
            host.close()

    def lose(self, loss: Loss | None) -> None:
        """Lets a device be lost at a tensor of the round that comes."""
        self._loss = loss

    def arrive(self) -> None:
        """Lets what was late arrive."""
        late, self._late = self._late, []
        for target, message in late:
            self.hosts[target].on_message(message)

    def carry(self, source: str, target: str, tag: Tag, array: np.ndarray[Any, Any]) -> bool:
        """Brings a tensor to its target; returns whether it has left."""
        loss = self._loss
        if loss is not None and loss.tensor is not None:
            own = device_name(loss.place)
            if own in (source, target) and own not in self.gone and loss.tensor(tag):
                self.gone.add(own)
                self.said.put(("lost", loss.place, {}))
        cut = self.gone & {source, target}
        late = loss is not None and loss.late
        if cut and not late:
            if target in cut:
                raise PeerLost(f"{target} is gone")
            return False
        peer = SimpleNamespace(peer=source)
        payloads = {"": fakes.payload(array)}
        key = source, target, tag
        self.held.append(key)
        message = Message("tensor", peer, tag=tag, payloads=payloads, nbytes=array.nbytes,
                          release=lambda: self.held.remove(key))  # fmt: skip
        if cut:
            self._late.append((target, message))
        else:
            self.hosts[target].on_message(message)
        return not cut


class Batches:
    """A device's mini-batches, in any order."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def get(self, step: int) -> Any:
        return self._loader.batch(step)


class Conductor:
    """What a coordinator does, for tests: rounds, losses, commits, averages.

    Attributes:
      script: For each round the spans that counted.

    Args:
      world: The hosts.
    """

    def __init__(self, world: World) -> None:
        self.world, self.plan = world, world.plan
        self.script: list[tuple[Span, ...]] = []
        self.sequential = world.plan.order == "sequential"
        params, state = world.network.init(world.config.seed)
        self.average = Aggregator(world.config.aggregation, params, state)
        self._names = tuple(params)
        self.part: States | None = None
        self._attempt = 0
        self._early: list[Any] = []
        steps = [-(-n // world.config.data.batch_size) * world.config.epochs for n in world.samples]
        for host in world.hosts.values():
            host.prepare(self.plan, world.samples, steps)
        self._collect(messages.Prepared, world.hosts)
        for name, host in world.hosts.items():
            need = memory.predict(world.network, self.plan, name, world.config, world.samples)
            assert need.kept == sum(one.kept_bytes for one in host.share.replicas.values())

    def round(
        self,
        index: int,
        spans: Sequence[Span],
        loss: Loss | None = None,
        away: Sequence[int] = (),
        left_out: Sequence[int] = (),
    ) -> None:
        """Conducts a round.

        Args:
          index: Its number.
          spans: Its spans.
          loss: The device that is lost, if one is.
          away: Places whose devices are not there.
          left_out: Places that do not count, though they have nothing to wait for.
        """
        world, self._spans = self.world, tuple(spans)
        self._lost: set[int] = set(away)
        self._loss = loss
        world.lose(loss)
        self._index = index
        self._release(self._spans)
        world.arrive()
        if self.sequential:
            self._relay()
        trained = self._await_trained()
        if loss is not None and loss.tensor is None:
            if not loss.late:
                world.gone.add(device_name(loss.place))
            self._lose(loss.place)
            if self.plan.sums_gradients:
                trained = self._await_trained()
        places = [
            place
            for place in range(len(self.plan.devices))
            if place not in (*self._lost, *left_out)
        ]
        present = self._present()
        for name in present:
            world.hosts[name].commit(places)
        self._finish(trained, places, present)
        self.script.append(self._spans)
        world.lose(None)
        if loss is not None and loss.late:
            world.gone.discard(device_name(loss.place))

    def variables(self) -> dict[str, np.ndarray[Any, Any]]:
        """Returns the global weights and statistics, those on nodes too, and optimiser states."""
        params, state = dict(self.average.params), dict(self.average.state)
        found: dict[str, Any] = {}
        for name, host in self.world.hosts.items():
            if name in self.world.gone:
                continue
            host.pull(exchanges.kept(self.plan, name, self._names))
            pulled = self._collect(messages.PulledState, [name])
            assert pulled is not None
            for (_, unit), one in pulled[name][1].items():
                params[unit], state[unit] = one.params, one.state
            for (copy, stage), replica in host.share.replicas.items():
                lost = not self.sequential and copy in self._lost and name[0] == "d"
                if not lost and not (self.sequential and copy != ALL):
                    found[f"{name} {copy} {stage} opt"] = replica.opt_state
        if self.part is not None:
            for (_, unit), one in self.part.items():
                params[unit], state[unit] = one.params, one.state
                found[f"client model {unit} opt"] = one.opt
        found |= {"params": params, "state": state}
        leaves = jax.tree_util.tree_flatten_with_path(found)[0]
        return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}

    def residues(self) -> dict[str, dict[str, int]]:
        """Returns what is left of work under way on each host that is there."""
        return {name: host.residue for name, host in self.world.hosts.items()
                if name not in self.world.gone}  # fmt: skip

    # --- a round's parts -----------------------------------------------------------------------

    def _present(self) -> list[str]:
        """Returns the hosts of the round that are in it still."""
        out = {device_name(place) for place in self._lost}
        return [name for name in self.world.hosts if name not in out | self.world.gone]

    def _release(self, spans: tuple[Span, ...]) -> None:
        self._attempt += 1
        places = tuple(range(len(self.plan.devices)))
        if self.sequential:
            spans = tuple(span for span in spans if span.stop > span.first)
        said = messages.Release(
            self._index,
            self._attempt,
            spans,
            places,
            self.world.samples,
            None,
            (1.0,) * len(places),
        )
        for name in self._present():
            self.world.hosts[name].release(said)

    def _await_trained(self) -> dict[str, Any]:
        """Waits until all hosts that are left have trained; those that are lost are dropped."""
        while True:
            found = self._collect(messages.Trained, self._present())
            if found is not None:
                return found

    def _lose(self, place: int) -> None:
        """Goes on without a place."""
        self._lost.add(place)
        loss = self._loss
        assert loss is not None
        spans = {span.device: span for span in self._spans}
        if self.plan.sums_gradients:
            self._redo(place)
        first = self._turn if self.sequential else spans[place].first
        if not self.sequential and not self.plan.sums_gradients:
            self._spans = tuple(
                Span(place, first, first) if span.device == place else span for span in self._spans
            )
            for name in self._present():
                self.world.hosts[name].drop(place, first)
        if loss.late:
            own = device_name(place)
            self.world.hosts[own].drop(place, first)
            self._collect(messages.Dropped, [own])
            self._early = [mail for mail in self._early if mail[0] != own]

    def _redo(self, place: int) -> None:
        """Lets the others compute the step anew in which a device has failed."""
        hosts = self._present()
        for name in hosts:
            self.world.hosts[name].halt((place,))
        halted = self._collect(messages.Halted, hosts)
        step = min(said.step for said, _ in halted.values())
        for name in hosts:
            self.world.hosts[name].rewind(step)
        self._collect(messages.Rewound, hosts)
        self._early = [mail for mail in self._early if not isinstance(mail[1], messages.Trained)]
        self._spans = tuple(
            span._replace(stop=step) if span.device == place else span for span in self._spans
        )
        # With nothing left to do the spans are empty.
        self._release(tuple(
            span._replace(first=step) for span in self._spans if span.device not in self._lost
        ))  # fmt: skip

    def _relay(self) -> None:
        """Hands the client-side model on; a turn in which its device is lost is undone."""
        turns = [span for span in self._spans if span.stop > span.first]
        if self.part is None:
            self.part = self._initial_part()
        while turns:
            span = turns.pop(0)
            name = device_name(span.device)
            self._turn = span.first
            self.world.hosts[name].push(messages.PushState(step=span.first), self.part)
            found = self._collect(messages.ClientModel, [name])
            if found is None:
                turns = [one for one in turns if one.device != span.device]
                self._spans = tuple(
                    one for one in self._spans
                    if one.device != span.device or one.stop <= span.first
                )  # fmt: skip
                for other in self._present():
                    self.world.hosts[other].drop(span.device, span.first)
            else:
                self.part = unit_state.copied(found[name][1])

    def _initial_part(self) -> States:
        self.world.hosts["d0"].pull(exchanges.client_model(self.plan, 0, self._names))
        found = self._collect(messages.PulledState, ["d0"])
        assert found is not None
        states: States = found["d0"][1]
        return states

    def _finish(
        self, trained: dict[str, Any], places: Sequence[int], present: Sequence[str]
    ) -> None:
        """Averages, and waits until all have stored what came of it."""
        if self.sequential:
            self._collect(messages.Stored, present)
            return
        copies: dict[int, Contribution] = {}
        for _, states in trained.values():
            for (copy, unit), one in states.items():
                own = copies.setdefault(copy, Contribution({}, {}, 1.0))
                own.params[unit], own.state[unit] = one.params, one.state
        schedule = RoundSchedule(
            self.plan, self._spans, self.world.samples, self.world.config.data.batch_size
        )
        weights = {span.device: float(schedule.trained_samples(span)) for span in self._spans}
        self.average.aggregate(
            [copies[place]._replace(weight=weights[place]) for place in places if place in copies]
        )
        late = [device_name(self._loss.place)] if self._loss is not None and self._loss.late else []
        give = [name for name in (*present, *late) if name[0] != "n"]
        for name in give:
            wanted = exchanges.averaged(self.plan, name, self._names)
            mean = unit_state.known(wanted, self.average)
            self.world.hosts[name].push(messages.PushState(round=self._index), mean)
        self._collect(messages.Stored, (*present, *late))

    def _collect(self, kind: type, names: Any) -> dict[str, Any] | None:
        """Waits for a message of each host; returns None once a device is lost meanwhile."""
        found: dict[str, Any] = {}
        while True:
            for mail in list(self._early):
                name, said, arrays = mail
                if isinstance(said, kind) and name in names and name not in found:
                    self._early.remove(mail)
                    found[name] = said, arrays
            if not set(names) - found.keys():
                return found
            name, said, arrays = self.world.said.get(timeout=PATIENCE_S)
            if isinstance(said, BaseException):
                raise said
            if name == "lost":
                self._early += [(name, *mail) for name, mail in found.items()]
                self._lose(said)
                return None
            self._early.append((name, said, arrays))
