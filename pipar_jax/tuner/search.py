"""The search for the best plan: lower bounds to order and prune, the simulator to evaluate.

Candidates are evaluated in the order of their lower bounds until the next bound is no better than
the best prediction; the remaining ones are proven worse. For one device and for equal devices this
is exact. Unequal devices get individual plans: a bisection on the deadline gives their lower bound
(each device takes the option that loads the server least and still meets the deadline) and the
starting point, from which devices are improved one after another; the gap to the bound is reported.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from pipar_jax import config as configuration
from pipar_jax.config import AggregationConfig, Config, PipelineConfig
from pipar_jax.config.codec_candidates import CodecCandidates, configured
from pipar_jax.config.texts import split_list, whole_numbers
from pipar_jax.cost_model.profile import Profile
from pipar_jax.errors import ConfigError, PlanError
from pipar_jax.methods.registry import METHODS
from pipar_jax.schedule.plan import Order, Plan, WeightPolicy
from pipar_jax.simulator.predict import (
    PlanEstimate,
    StageCosts,
    estimate,
    round_of,
    rounds_per_epoch,
)
from pipar_jax.tuner import codec_choice
from pipar_jax.tuner.bounds import (
    DeviceOption,
    LowerBound,
    excess,
    least,
    round_bound_s,
    sequential_bound_s,
)
from pipar_jax.tuner.paper import paper_plan
from pipar_jax.tuner.plan_labels import labels

#: Number of options tried for each unequal device.
ALTERNATIVES = 3


class SearchResult(NamedTuple):
    """The result of a search.

    Attributes:
      plans: The evaluated plans, best first, at least one of each feasible method. With
        ``tuner.codecs`` the first is the fastest with as many bits as cost no time.
      bound_s: Lower bound of all candidates, in seconds per epoch.
      exact: Whether the first plan is proven to be the best of all candidates.
      judged: Number of simulated plans.
      candidates: Number of candidates.
      paper: The plan of the paper's selection, evaluated in the same way; None without a cut.
    """

    plans: tuple[PlanEstimate, ...]
    bound_s: float
    exact: bool
    judged: int
    candidates: int
    paper: PlanEstimate | None

    @property
    def gap(self) -> float:
        """Upper bound of the relative difference between the best plan and the optimum."""
        best_s = self.plans[0].epoch_s
        return max(0.0, best_s / self.bound_s - 1.0) if self.bound_s else 0.0


class _Candidate(NamedTuple):
    """A candidate plan with its lower bound."""

    bound_s: float
    plan: Plan


def tune(profile: Profile, config: Config) -> Plan:
    """Returns the plan with the shortest epoch, or the paper's with tuner.select=paper.

    Args:
      profile: The profile of hosts and links.
      config: Resolved configuration; ``tuner``, ``aggregation`` and ``pipeline`` are used.

    Raises:
      ConfigError: The configuration allows no plan.
      PlanError: No plan fits into the hosts' memory.
    """
    if config.tuner.select == "paper":
        return paper_plan(
            StageCosts(profile),
            _frame(config.pipeline, config.aggregation, len(profile.devices)),
            configured(config.pipeline),
        )
    return search(profile, config).plans[0].plan


def search(profile: Profile, config: Config) -> SearchResult:
    """Returns the best plans over methods, cuts, N, codecs and dispatch policies.

    Args:
      profile: The profile of hosts and links.
      config: Resolved configuration.

    Raises:
      ConfigError: The configuration allows no plan.
      PlanError: No plan fits into the hosts' memory.
    """
    frame = _frame(config.pipeline, config.aggregation, len(profile.devices))
    return _Search(profile, codec_choice.candidates_for(config, profile), frame).run()


class _Search:
    """A search and its evaluated plans."""

    def __init__(self, profile: Profile, candidates: CodecCandidates, frame: Plan) -> None:
        self.stages, self.profile, self.tuner = StageCosts(profile), profile, candidates.tuner
        self.candidates, self.frame = candidates, frame
        self.methods = [METHODS[name] for name in split_list(self.tuner.methods)]
        kinds = {
            (device.host, device.samples, device.up, device.down) for device in profile.devices
        }
        self.equal = len(kinds) < 2
        self.spans = {
            span.device: span for span in round_of(profile, self._plan([DeviceOption(0)])).spans
        }
        self.scale = rounds_per_epoch(profile, self.frame)
        self.judged: dict[Plan, PlanEstimate] = {}
        self.actions = self.simulated = 0
        self._least: dict[tuple[int, DeviceOption], LowerBound] = {}
        self.known = [
            next(i for i, other in enumerate(profile.devices) if other == device)
            for device in profile.devices
        ]

    def run(self) -> SearchResult:
        options = self._options()
        candidates = sorted(self._common(options), key=lambda candidate: candidate.bound_s)
        if not candidates:
            raise ConfigError(
                f"tuner.methods={self.tuner.methods!r} allows no plan for a model of "
                f"{len(self.profile.units)} units: allow fl, or use a larger model"
            )
        fitting = [
            candidate for candidate in candidates if excess(self.stages, candidate.plan) is None
        ]
        if not fitting:
            reason = excess(self.stages, candidates[0].plan)
            raise PlanError(
                f"no plan fits into the hosts' memory ({reason}): raise memory_mb, lower "
                "data.batch_size, or allow more of tuner.methods"
            )
        share = 1.0 if self.equal else 0.5
        left_s = self._judge_in_order(fitting, share * self.tuner.actions)
        best_s = min(judged.epoch_s for judged in self.judged.values())
        exact, bound_s = left_s >= best_s, min(left_s, best_s)
        if not self.equal and any(method.order == Order.PARALLEL for method in self.methods):
            bound_s = min(
                bound_s, self._improve([option for option in options if self._parallel(option)])
            )
            best_s = min(judged.epoch_s for judged in self.judged.values())
            exact = bound_s >= best_s
        for method in self.methods:  # reference for the best
            if not any(labels(plan)["method"] == method.name for plan in self.judged):
                plans_of = (candidate.plan for candidate in fitting)
                best = next((p for p in plans_of if labels(p)["method"] == method.name), None)
                if best is not None:
                    self._judge(best)
        plans = self._distinct()
        if self.candidates.chosen:
            plans = self._sharpened(plans)
        paper = None
        if len(self.profile.units) > 1:
            codecs = configured(self.candidates.pipeline)
            paper = estimate(self.stages, paper_plan(self.stages, self.frame, codecs))
        return SearchResult(tuple(plans), bound_s, exact, len(self.judged), len(candidates), paper)

    def _distinct(self) -> list[PlanEstimate]:
        """Returns the evaluated plans, best first, each with its best dispatch policy only."""
        best: dict[tuple[object, str], PlanEstimate] = {}
        for judged in sorted(self.judged.values(), key=lambda judged: judged.epoch_s):
            best.setdefault((judged.plan.devices, judged.plan.order), judged)
        return list(best.values())

    def _sharpened(self, plans: list[PlanEstimate]) -> list[PlanEstimate]:
        """Returns the plans, the best one with as many bits as cost no time.

        The limit of the search includes extrapolated actions, of which a long round has many; here
        only simulated actions count.
        """
        most = self.simulated + 0.25 * self.tuner.actions

        def seconds(plan: Plan) -> float | None:
            return self._judge(plan) if self.simulated <= most or plan in self.judged else None

        best = plans[0].plan
        slots = codec_choice.slots(best, self.profile)
        sharp = codec_choice.raise_precision(best, slots, self.candidates, seconds)
        return plans if sharp == best else [self.judged[sharp], *plans]

    # --- candidates ---------------------------------------------------------------------------

    def _options(self) -> list[DeviceOption]:
        """Returns all options of a device."""
        count, batch = len(self.profile.units), self.profile.batch_size
        cutting = [method for method in self.methods if method.cuts]
        numbers = set() if all(method.pipelined for method in cutting) else {1}
        if any(method.pipelined for method in cutting):
            numbers |= {min(n, batch) for n in whole_numbers(self.tuner.micro_batches)}
        pairs = self.candidates.pairs()
        codec_choice.check_measured(self.candidates, self.profile)
        options = [] if len(cutting) == len(self.methods) else [DeviceOption(0)]
        for cut in range(1, count):
            for n in sorted(numbers):
                options += [DeviceOption(cut, n, pair) for pair in pairs]
        return options

    def _parallel(self, option: DeviceOption) -> bool:
        """Returns whether an option belongs to an allowed method in parallel order."""
        return self._allows(Order.PARALLEL, option)

    def _allows(self, order: Order, option: DeviceOption) -> bool:
        """Returns whether an option belongs to one of the methods in an order."""
        cuts, number = bool(option.cut), option.micro_batches
        makes = (
            method.makes(order=order, cuts=cuts, micro_batches=number) for method in self.methods
        )
        return any(makes)

    def _common(self, options: Iterable[DeviceOption]) -> Iterator[_Candidate]:
        """Yields the plans in which all devices have the same option, with their bounds."""
        for option in options:
            all_least = [self._at_least(d, option) for d in range(len(self.profile.devices))]
            if self._parallel(option):
                bound_s = round_bound_s(self.stages, all_least) * self.scale
                for dispatch in self._dispatches(option):
                    yield _Candidate(bound_s, self._plan([option], dispatch))
            if self._allows(Order.SEQUENTIAL, option):
                plan = Plan(
                    self._plan([option]).devices,
                    order=Order.SEQUENTIAL, weights=WeightPolicy.SHARED,
                    dispatch=self.frame.dispatch, aggregate_every=self.frame.aggregate_every,
                    hand_on=self.frame.hand_on,
                )  # fmt: skip
                yield _Candidate(self._sequential_bound_s(option), plan)

    def _sequential_bound_s(self, option: DeviceOption) -> float:
        """Returns the bound of an epoch in which devices take turns."""
        one_epoch = [
            least(self.stages, d, option, self.spans[d]._replace(stop=self.profile.steps(d)))
            for d in range(len(self.profile.devices))
        ]
        return sequential_bound_s(self.stages, one_epoch, option.cut)

    def _dispatches(self, option: DeviceOption) -> Sequence[str]:
        """Returns the dispatch policies worth trying."""
        wanted = split_list(self.tuner.dispatch)
        if not option.cut or (option.micro_batches == 1 and len(self.profile.devices) == 1):
            return wanted[:1]  # there is never more than one ready action
        if len(self.profile.devices) == 1 and "fixed" in wanted:
            return ("fixed",)  # all forwards first is the best order, see ``least``
        if self.equal:
            return [name for name in wanted if name != "slowest_first"] or wanted
        return wanted

    def _plan(self, options: Sequence[DeviceOption], dispatch: str | None = None) -> Plan:
        """Returns a plan in parallel order; one option stands for all devices."""
        chains = [option.device_plan() for option in options]
        many = len(self.profile.devices)
        return Plan(
            tuple(chains * many if len(chains) == 1 else chains),
            dispatch=dispatch or self.frame.dispatch,  # type: ignore[arg-type]
            aggregate_every=self.frame.aggregate_every,
        )

    def _at_least(self, device: int, option: DeviceOption) -> LowerBound:
        """Returns the bound of a device, computed once for equal devices."""
        key = self.known[device], option
        if key not in self._least:
            self._least[key] = least(self.stages, device, option, self.spans[device])
        return self._least[key]

    # --- judging ------------------------------------------------------------------------------

    def _judge(self, plan: Plan) -> float:
        """Simulates a plan once; returns its seconds per epoch."""
        if plan not in self.judged:
            self.judged[plan] = judged = estimate(self.stages, plan)
            self.actions += judged.round.actions
            self.simulated += judged.round.simulated
        return self.judged[plan].epoch_s

    def _judge_in_order(self, candidates: Sequence[_Candidate], actions: float) -> float:
        """Evaluates candidates until the rest is proven worse, or the limit of actions is reached.

        Returns:
          The bound of the first candidate that was not evaluated; infinite if there is none.
        """
        best_s = math.inf
        for candidate in candidates:
            if candidate.bound_s >= best_s or (self.judged and self.actions > actions):
                return candidate.bound_s
            best_s = min(best_s, self._judge(candidate.plan))
        return math.inf

    # --- unequal devices ----------------------------------------------------------------------

    def _improve(self, options: Sequence[DeviceOption]) -> float:
        """Searches plans with individual options; returns their bound in seconds per epoch."""
        bound_s, start = self._bisect(options)
        dispatch = min(self.judged.values(), key=lambda judged: judged.epoch_s).plan.dispatch
        plan = self._plan(start, dispatch)
        if excess(self.stages, plan) is None:
            self._judge(plan)
        best = min(self.judged.values(), key=lambda judged: judged.epoch_s).plan
        if best.order == Order.SEQUENTIAL:
            return bound_s
        chosen = [
            DeviceOption(chain.cuts[0] if chain.cuts else 0, chain.micro_batches, *chain.codecs)
            for chain in best.devices
        ]
        best_s, improved = self.judged[best].epoch_s, True
        while improved and self.actions <= self.tuner.actions:
            improved = False
            for device in range(len(chosen)):
                for option in self._alternatives(device, options, best_s):
                    tried = [*chosen[:device], option, *chosen[device + 1 :]]
                    plan = self._plan(tried, best.dispatch)
                    if plan in self.judged or excess(self.stages, plan) is not None:
                        continue
                    if self.actions > self.tuner.actions:
                        return bound_s
                    if self._judge(plan) < best_s:
                        best_s, chosen, improved = self.judged[plan].epoch_s, tried, True
        return bound_s

    def _alternatives(
        self, device: int, options: Sequence[DeviceOption], deadline_s: float
    ) -> list[DeviceOption]:
        """Returns a device's options that may meet a deadline: the fastest, and the lightest."""
        able = [
            (self._at_least(device, option), option)
            for option in options
            if self._at_least(device, option).round_s * self.scale < deadline_s
        ]
        fast = sorted(able, key=lambda pair: pair[0].round_s)[:ALTERNATIVES]
        light = sorted(able, key=lambda pair: pair[0].server_s)[:ALTERNATIVES]
        return list(dict.fromkeys(option for _, option in (*fast, *light)))

    def _bisect(self, options: Sequence[DeviceOption]) -> tuple[float, list[DeviceOption]]:
        """Returns the lowest deadline that is not proven impossible, and the options for it.

        For a deadline each device takes the option that loads the server least among those that
        meet it alone; if even the sum of these loads exceeds the deadline, no plan meets it.
        """
        tables = {  # equal devices share one
            d: sorted(
                ((self._at_least(d, o), o) for o in options), key=lambda pair: pair[0].round_s
            )
            for d in dict.fromkeys(self.known)
        }

        def lightest(deadline_s: float) -> list[tuple[LowerBound, DeviceOption]] | None:
            best = {}
            for device, table in tables.items():
                able = [pair for pair in table if pair[0].round_s <= deadline_s]
                if not able:
                    return None
                best[device] = min(able, key=lambda pair: (pair[0].server_s, pair[0].round_s))
            chosen = [best[device] for device in self.known]
            met = sum(pair[0].server_s for pair in chosen) <= deadline_s
            return chosen if met else None

        low_s = max(table[0][0].round_s for table in tables.values())
        high_s = max(low_s, sum(tables[device][0][0].server_s for device in self.known))
        high_s = max(high_s, max(table[-1][0].round_s for table in tables.values()))
        chosen = lightest(low_s)
        if chosen is None:
            for _ in range(40):
                middle_s = (low_s + high_s) / 2
                if lightest(middle_s) is None:
                    low_s = middle_s
                else:
                    high_s = middle_s
            chosen = lightest(high_s)
        assert chosen is not None  # at high_s every option is possible
        return low_s * self.scale, [option for _, option in chosen]


def _frame(pipeline: PipelineConfig, aggregation: AggregationConfig, devices: int) -> Plan:
    """Returns a plan of uncut models with what the configuration says for all candidates."""
    return Plan(
        (DeviceOption(0).device_plan(),) * devices,
        dispatch=pipeline.dispatch,  # type: ignore[arg-type]  # resolve() checked it
        aggregate_every=configuration.aggregate_steps(aggregation),
        hand_on=pipeline.hand_on,  # type: ignore[arg-type]
    )
