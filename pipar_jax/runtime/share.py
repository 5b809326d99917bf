"""A host's share of a plan: the replicas of its stages, compiled, and the memory they take."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping, Sequence

from pipar_jax.config import Config, may_lose
from pipar_jax.methods.registry import hosts_of
from pipar_jax.runtime import exchanges, finite, memory, migration, undo
from pipar_jax.runtime.node_averaging import Averaging
from pipar_jax.runtime.personal import PersonalWeights
from pipar_jax.runtime.precompile import compile_plan
from pipar_jax.runtime.ragged import Apart, MicroBatchSizes
from pipar_jax.runtime.releases import Releases
from pipar_jax.runtime.step_lengths import StepLengths
from pipar_jax.runtime.transfer import compile_codecs
from pipar_jax.runtime.unit_state import Key, UnitState, Wanted
from pipar_jax.schedule.feasibility import check_executable
from pipar_jax.schedule.host_program import HostProgram
from pipar_jax.schedule.keep import Keep
from pipar_jax.schedule.plan import Order, Plan, host_index, is_device
from pipar_jax.schedule.rounds import RoundSchedule
from pipar_jax.training import optimizer
from pipar_jax.training.compile import Told, compile_all
from pipar_jax.training.replica import Replica
from stages import Model, return_memory
from stages.lengths import variants


class Share:
    """What a host has of a plan.

    Owned by the host's dispatch thread, except for ``compile_ahead``.

    Attributes:
      model: The whole model.
      seat: What the plan calls the host: a device after its place in the cohort.
      plan: The plan in force, from ``prepare`` on.
      program: What it means for the host.
      samples: Samples of an epoch by place.
      replicas: The weights here by (place, stage); (ALL, stage) where devices share a copy.
      averaging: Averages what lives together here.
      personal: A device's personal weights, if it has any.
      lengths: To what the mini-batches here are padded; any thread's.
      sizes: The sizes of the micro-batches here, from ``prepare`` on.
      fixed_bytes: Bytes of replicas and averages, constant until the plan changes.

    Args:
      name: The host's name.
      model: The whole model.
      config: Resolved configuration.
      rematerialise: Computes forward passes again in backward passes instead of keeping residuals.
      releases: What a device of a private run may send.
      personal: See above.
    """

    plan: Plan
    program: HostProgram
    sizes: MicroBatchSizes
    averaging: Averaging

    def __init__(
        self,
        name: str,
        model: Model,
        config: Config,
        *,
        rematerialise: bool = False,
        releases: Releases | None = None,
        personal: PersonalWeights | None = None,
    ) -> None:
        self._name, self.model, self._config = name, model, config
        self._rematerialise, self._releases, self.personal = rematerialise, releases, personal
        self._may_change = may_lose(config.cohort, config.devices.total) or bool(
            config.devices.more or config.cohort.size
        )
        self._apart: Apart = {}
        self._released: migration.Released | None = None
        if releases is not None:
            self._released = functools.partial(releases.stages, model)
        self.seat = hosts_of(config).first_seat(name)
        self.lengths = StepLengths(model.lengths)
        self.samples: tuple[int, ...] = ()
        self.replicas: dict[tuple[int, int], Replica] = {}
        self.fixed_bytes = self.temporary_bytes = 0

    def prepare(
        self,
        plan: Plan,
        samples: tuple[int, ...],
        steps: Sequence[int],
        *,
        between: Callable[[], None],
        told: Told,
    ) -> int:
        """Builds replicas from the seed and compiles all shapes of a plan.

        Args:
          plan: The run's plan.
          samples: Samples of an epoch by place.
          steps: Steps of the whole run by place.
          between: Called between stages, to detect that they are no longer wanted.
          told: Receives how much is done.

        Returns:
          Bytes of memory that training is predicted to take.

        Raises:
          PlanError: No host of this runtime could carry the plan out.
          RunError: A compute node would need more memory than it may take.
        """
        self.samples = samples
        need = memory.predict(self.model, plan, self.seat, self._config, samples)
        hosts = hosts_of(self._config)
        memory.check(need, None, hosts, self._name, plan)
        self._take(plan)
        self._build(steps)
        self._expect()
        self._compile(between, told)
        self._compile_codecs(plan, self.sizes.all)
        self._weigh()
        memory.check(need, self.temporary_bytes, hosts, self._name, plan)
        return_memory()  # of compiling
        return need.arrays + self.temporary_bytes

    def adopt(self, plan: Plan, arrived: Mapping[Key, UnitState]) -> None:
        """Changes to another plan, with replicas made of what is here and what has arrived."""
        averages = dict(self.averaging.units())
        self._take(plan)
        self.sizes.settle()  # what was compiled ahead was tried
        self.replicas = migration.assemble(
            self.model, plan, self.seat, self.replicas, arrived, self._optimizer,
            self._find_keep(),
            rematerialise=self._rematerialise, releases=self._released,
        )  # fmt: skip
        for replica in self.replicas.values():  # what came from a copy may have an older anchor
            replica.renew_anchor()
        self.averaging = Averaging.after(
            self._config.aggregation, self.program, self.replicas, averages, arrived
        )
        self._expect()
        self._weigh()

    def leave_out(self, schedule: RoundSchedule, places: Collection[int], rounds: int) -> None:
        """Undoes what places that do not count have trained here.

        Args:
          schedule: The round that is over.
          places: The places that count.
          rounds: How many rounds are over with it.
        """
        undo.leave_out(self.replicas, schedule, places)
        if self.personal is None:
            return
        if host_index(self.seat) in places:
            self.personal.take(self.replicas.values(), rounds)
        else:
            self.personal.give(self.replicas.values())

    def own_states(self) -> Wanted:
        """Returns what this host alone keeps on its disk, in addition to personal weights."""
        if self._config.cohort.size and is_device(self._name):
            return {}  # in another place it begins with a fresh optimiser
        return exchanges.optimizer_states(self.plan, self.seat, self.model.unit_names)

    def sit(self, seat: str) -> None:
        """Moves to another place; places differ only in their number."""
        old, new = host_index(self.seat), host_index(seat)
        if old == new:
            return
        self.seat = seat
        for place, stage in list(self.replicas):
            if place == old:
                self.replicas[new, stage] = self.replicas.pop((place, stage))
        self._take(self.plan)
        self.sizes.told(self.replicas.values())
        self.averaging = Averaging(self._config.aggregation, self.program, self.replicas, {}, {})

    def compile_ahead(self, plan: Plan, between: Callable[[], None]) -> str | None:
        """Compiles what a coming plan needs here; runs on a thread of its own.

        Args:
          plan: The plan.
          between: Called between stages, to detect that they are no longer wanted.

        Returns:
          Why this host refuses it, or None.
        """
        sizes = self._find_sizes(_program(plan, self.seat))
        self._compile_codecs(plan, sizes.all)
        return compile_plan(
            self.model, plan, self.seat, self._config, self.samples, sizes, self._optimizer,
            rematerialise=self._rematerialise, releases=self._released, between=between,
        )  # fmt: skip

    def _take(self, plan: Plan) -> None:
        self.plan, self.program = plan, _program(plan, self.seat)
        self.sizes = self._find_sizes(self.program)

    def _find_sizes(self, program: HostProgram) -> MicroBatchSizes:
        return MicroBatchSizes(
            self.model, program, self.samples, self._config.data.batch_size,
            exact=not (self._config.privacy.on or self._may_change), known=self._apart,
        )  # fmt: skip

    def _compile(self, between: Callable[[], None], told: Told) -> None:
        """Compiles all shapes of the plan, the smaller ones of a last mini-batch if need be."""
        replicas, sizes = self.replicas.values(), self.sizes
        compile_all(self.model, replicas, sizes.computed, between=between, told=told)
        if not sizes.confirm(replicas):
            sizes.told(replicas)
            compile_all(self.model, replicas, sizes.computed, between=between, told=told)

    def _build(self, steps: Sequence[int]) -> None:
        """Builds the replicas from the seed, and compiles their optimiser and their average."""
        plan, config = self.plan, self._config
        # One replica takes the steps of all devices in turn, or each its own device's.
        taken = sum(steps) if plan.order == Order.SEQUENTIAL else max(steps)
        self._optimizer = optimizer.compiled(
            config.optimizer, steps=taken, proximal_mu=config.aggregation.proximal_mu
        )
        names = self.model.unit_names
        held = {names[unit] for unit in plan.held_units(self.seat, len(names))}
        params, state = self.model.init(config.seed, only=held)
        if self._releases is not None:
            place = host_index(self.seat)
            self._releases.calibrate(plan.devices[place], steps[place])
        keeps = self._find_keep()
        for place, device in enumerate(plan.devices):
            cut = migration.cut_stages(self.model, device, self._rematerialise, self._released)
            for index, stage in enumerate(cut):
                key = self.program.replica_key(place, index)
                if plan.host(place, index) == self.seat and key not in self.replicas:
                    self.replicas[key] = Replica(
                        stage, params, state, self._optimizer, keeps(key[0])
                    )
        if self.personal is not None:  # of before, where the device has joined again
            self.personal.give(self.replicas.values())
        self.averaging = Averaging(config.aggregation, self.program, self.replicas, params, state)
        self.averaging.compile()

    def _find_keep(self) -> Callable[[int], Keep]:
        """Returns what says of a copy what it keeps of earlier moments."""
        hosts, cohort = hosts_of(self._config), self._config.cohort
        return functools.partial(undo.find_keep, hosts, cohort, self.plan)

    def _expect(self) -> None:
        self.sizes.told(self.replicas.values())
        for replica in self.replicas.values():
            replica.expect(single=self.plan.has_single_micro_batches)

    def _compile_codecs(self, plan: Plan, sizes: Collection[int]) -> None:
        """Compiles the codecs of every cut at which this host meets another."""
        for place, device in enumerate(plan.devices):
            for index, cut in enumerate(device.cuts):
                ends = {plan.host(place, index), plan.host(place, index + 1)}
                if self.seat in ends and len(ends) == 2:
                    forms = variants(self.model)
                    shapes = [form.shapes(size)[cut] for form in forms for size in sizes]
                    codecs = device.codecs[index]
                    compile_codecs((codecs.activation, codecs.cotangent), shapes)

    def _weigh(self) -> None:
        """Records the replicas' memory; compiles what looks for numbers that are not finite."""
        finite.broken_units(self.replicas, ())
        replicas = self.replicas.values()
        held_bytes = sum(replica.nbytes for replica in replicas)
        self.fixed_bytes = held_bytes + self.averaging.nbytes
        self.temporary_bytes = memory.temporary_bytes(self.model, replicas, self.sizes.computed)


def _program(plan: Plan, host: str) -> HostProgram:
    """Returns what a plan means for a host.

    Raises:
      PlanError: No host of this runtime could carry the plan out.
    """
    check_executable(plan)
    return HostProgram(plan, host)
