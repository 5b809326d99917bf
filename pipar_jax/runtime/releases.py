"""What a device of a private run releases: its budget, its ledger, and the bits of its noise."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from numpy.typing import NDArray

from pipar_jax.config import Config
from pipar_jax.config.checkpoints import state_folders
from pipar_jax.data import Dataset
from pipar_jax.data.fingerprint import fingerprint
from pipar_jax.errors import DataError, RunError
from pipar_jax.methods.privacy_checks import check_delta
from pipar_jax.methods.registry import METHODS
from pipar_jax.privacy import labels, policy
from pipar_jax.privacy.accountant import spent_for
from pipar_jax.privacy.adaptive_clip import CLIPPED, WITHIN, is_possible
from pipar_jax.privacy.clip_watch import CLIP_LOG, ClipWatch
from pipar_jax.privacy.ledger import PrivacyLedger
from pipar_jax.privacy.noise import NoiseSource, reproducible_key
from pipar_jax.privacy.policy import Guarantee
from pipar_jax.privacy.spending import Entry
from pipar_jax.runtime.stage_releases import stage_releases, units_of_stage
from pipar_jax.schedule.actions import Action
from pipar_jax.schedule.plan import OWNER, DevicePlan
from pipar_jax.training.replica import Noise, Replica
from stages import MicroBatchContext, Model, Stage
from stages.release import PrivateRelease, bits_shape
from stages.signature import TARGET

#: In the order in which a stage counts what it clips.
_KINDS = policy.ACTIVATIONS, policy.GRADIENTS, policy.COTANGENTS
#: Counts that may wait to be read, since reading waits for the computation.
_MOST_UNREAD = 1024


class Releases:
    """Lets a device send nothing that is not clipped, noised, within budget and on disk.

    Its host's dispatch thread calls it.

    Args:
      config: Resolved configuration of a private run.
      name: The device's name.

    Raises:
      RunError: The ledger of an earlier part of the run cannot be read.
    """

    def __init__(self, config: Config, name: str) -> None:
        self._config, self._privacy, self._name = config, config.privacy, name
        self._folder, *earlier = state_folders(config.name, config.run, name)
        self._earlier = tuple(earlier)
        self.ledger = PrivacyLedger(self._folder, self._earlier)
        self._samples, self._data = 0, ""
        self._source = NoiseSource()
        self._guarantee: Guarantee | None = None
        self._clip, self._within = self._privacy.update_clip, 0.0
        self._entered: set[int] = set()
        self._watch = ClipWatch(self._privacy)
        self._unread: list[tuple[PrivateRelease, jax.Array, int]] = []

    def protect(self, dataset: Dataset) -> tuple[Dataset, str]:
        """Returns a device's data with the labels that it gives away, and their fingerprint.

        Args:
          dataset: The device's data.

        Returns:
          The data, and what tells them from others to the coordinator: it is keyed, so that nobody
          can test guesses of the data against it.

        Raises:
          DiskError: The secret or the ledger cannot be written.
          RunError: The secret cannot be read, or the budget does not allow to give labels anew.
        """
        privacy, known = self._privacy, fingerprint(dataset.train)
        if privacy.reproducible:
            secret = reproducible_key(self._config.seed, self._name, "labels")
        else:
            secret = labels.read_secret(self._folder, self._earlier)
        if privacy.labels == "randomised":
            epsilon = policy.label_epsilon(privacy)
            response = labels.response_name(secret, known, dataset.classes, epsilon)
            self._check_labels(self.ledger.spending.labels_after(response, epsilon))
            self.ledger.add_labels(response, epsilon)
            own = self._labels(dataset)
            given = labels.randomised(own, dataset.classes, epsilon, secret, response)
            train = dataclasses.replace(dataset.train, targets={TARGET: given})
            dataset = dataclasses.replace(dataset, train=train)
        keyed = labels.keyed_fingerprint(secret, known)
        self._data = keyed[:16]
        return dataset, keyed

    def _check_labels(self, epsilon: float) -> None:
        """Checks that labels, those that were given before included, keep within the budget."""
        budget = self._privacy.epsilon
        if budget is not None and epsilon >= budget:
            raise RunError(
                f"{self._name} has given labels of other data or with another epsilon before, "
                f"under this name; with those of this run they come to epsilon {epsilon:.4g} of "
                f"privacy.epsilon={budget:g}: begin a run under another name and account for both "
                "yourself"
            )

    def _labels(self, dataset: Dataset) -> NDArray[np.int32]:
        """Returns the labels of a device's data.

        Raises:
          DataError: Its targets are something else.
        """
        targets = dataset.train.targets
        own = targets.get(TARGET)
        if len(targets) != 1 or own is None or own.ndim != 1 or own.dtype.kind not in "iu":
            kinds = {name: f"{one.dtype}{list(one.shape)}" for name, one in targets.items()}
            raise DataError(
                f"privacy.labels=randomised needs one label for each sample, and the targets of "
                f"{self._name} are {kinds}: use labels=unprotected, or a method that keeps them"
            )
        return own.astype(np.int32)

    def expect(self, samples: int) -> None:
        """Takes the number of samples of an epoch on this device.

        Raises:
          ConfigError: ``privacy.delta`` is too large for these samples.
        """
        self._samples = samples
        if self._privacy.unit == "record":
            check_delta(self._privacy, samples, f"samples on {self._name}")

    def close(self) -> None:
        """Closes the ledger. Idempotent."""
        self.ledger.close()

    # --- budget -------------------------------------------------------------------------------

    def calibrate(self, plan: DevicePlan, steps: int) -> None:
        """Fixes the noise for a run.

        Args:
          plan: The device's part of the plan.
          steps: Steps that it takes in the whole run.

        Raises:
          RunError: Under the plan something would leave that the configuration keeps on the device.
        """
        self._check_plan(plan)
        if self._privacy.unit == "user":
            times = policy.rounds_of_users(self._config)
        else:
            times = math.ceil(steps / self._steps_per_epoch)
        made = policy.guarantee(self._privacy, plan.hosts, times)
        given = self.ledger.spending.label_epsilon
        if self._privacy.epsilon is not None and given > policy.label_epsilon(self._privacy):
            # Labels of other data, or with another epsilon, were given before: less is left.
            left = max(self._privacy.epsilon - given, 0.0)
            limit = spent_for(left, self._privacy.delta, self._privacy.accountant) if left else 0.0
            made = dataclasses.replace(made, limit=limit)
        self._guarantee = made

    def _check_plan(self, plan: DevicePlan) -> None:
        """Checks a plan, which is the coordinator's word, against the device's configuration."""
        method, hosts = METHODS[self._config.method], plan.hosts
        departures = sum(here == OWNER != above for here, above in itertools.pairwise(hosts))
        home = method.keeps_labels(self._config.pipeline)
        if departures > method.cuts or (home and hosts[-1] != OWNER):
            raise RunError(
                f"{self._name} was told to train under the plan {plan}, which sends what "
                f"method={self._config.method}"
                f"{' with pipeline.labels=home' if home else ''} keeps on the device: a private "
                "device does not follow it"
            )

    @property
    def guarantee(self) -> Guarantee:
        """What is promised; after ``calibrate``."""
        assert self._guarantee is not None
        return self._guarantee

    @property
    def spent(self) -> float:
        """What the Gaussian releases of a record or user come to so far."""
        return self.ledger.spending.spent

    @property
    def epsilon(self) -> float:
        """The epsilon of all that was released so far."""
        return policy.epsilon_of(self._privacy, self.ledger.spending)

    @property
    def _steps_per_epoch(self) -> int:
        return -(-self._samples // self._config.data.batch_size)

    def start_attempt(self, clip: float = 0.0) -> None:
        """Begins a round or repeats it: every step from here on is a further release.

        Args:
          clip: Norm to which updates are clipped, if that adapts; else 0.

        Raises:
          RunError: The coordinator names a clip to which no clip of this run can have come.
        """
        self._entered.clear()
        self._within = 0.0
        if self._privacy.clip_quantile is None:
            return
        if not is_possible(self._privacy, clip):
            raise RunError(
                f"{self._name} was told to clip its update to {clip:g}, which is no clip of a run "
                f"that begins with privacy.update_clip={self._privacy.update_clip:g}: a private "
                "device does not follow it"
            )
        self._clip = clip

    def _enter(self, entry: Entry) -> None:
        if self.ledger.spending.spent_after(entry) > self.guarantee.limit:
            raise RunError(
                f"{self._name} has released epsilon {self.epsilon:.4g} of privacy.epsilon="
                f"{self._privacy.epsilon:g}, and its next mini-batch would exceed that: the run "
                "ends here; releases of earlier runs under this name and repeated rounds count"
            )
        self.ledger.add(entry, self.guarantee.releases)

    # --- releases of records ------------------------------------------------------------------

    def stages(self, model: Model, plan: DevicePlan) -> Mapping[int, PrivateRelease]:
        """Returns what of the device's stages is released under a plan, by the stage's index.

        Raises:
          RunError: Samples of a stage depend on each other, side inputs leave the device, or the
            plan does not fit the configuration.
        """
        self._check_plan(plan)
        if self._privacy.unit == "user":
            return {}
        if policy.releases(self._privacy, plan.hosts) != self.guarantee.releases:
            raise RunError(
                f"{self._name} has calibrated its noise to {', '.join(self.guarantee.releases)}, "
                f"and under the plan {plan} it would release something else"
            )
        own = [index for index, host in enumerate(plan.hosts) if host == OWNER]
        self._check_independent(plan, own, model)
        return stage_releases(self._privacy, self.guarantee.noise, plan, model)

    def _check_independent(self, plan: DevicePlan, own: Sequence[int], model: Model) -> None:
        """Checks that clipping each sample bounds what it changes."""
        units = [
            model.units[unit] for i in own for unit in units_of_stage(plan, i, len(model.units))
        ]
        if coupling := [unit.name for unit in units if unit.state]:
            raise RunError(
                f"units {coupling} on {self._name} keep statistics of mini-batches, which couple "
                "their samples: a private run needs others, such as group normalisation"
            )
        inside = {unit.name for unit in units}
        sent = {side for unit in model.units if unit.name not in inside for side in unit.sides}
        if sent:
            raise RunError(
                f"side inputs {sorted(sent)} leave {self._name} as they are, and are made from its "
                "data: cut the model above all units that use them, or train with method=fl"
            )
        last = [model.units[unit] for unit in units_of_stage(plan, own[-1], len(model.units))]
        noised = policy.releases_cotangents(self._privacy, plan.hosts)
        told = {side for unit in last for side in unit.sides}
        if told and policy.ends_at_home(plan.hosts) and not noised:
            raise RunError(
                f"cotangents leave {self._name}'s last stage without noise, and are functions of "
                f"its side inputs {sorted(told)}: set privacy.labels=home"
            )

    def draw(self, draw: MicroBatchContext, action: Action, stage: Stage, samples: int) -> (
        MicroBatchContext
    ):  # fmt: skip
        """Enters a step in the ledger before anything of it is computed; returns its noise as well.

        Args:
          draw: The scalars of the micro-batch.
          action: A forward pass, or the last stage.
          stage: Its stage.
          samples: Samples in the micro-batch.
        """
        if stage.release is None:
            return draw
        if action.step not in self._entered:
            self._enter(
                policy.step_entry(
                    self._config, self._samples, action.step, self.guarantee.cost, self._data
                )
            )
            self._entered.add(action.step)
        if not stage.release.sends:
            return draw
        source = self._stream(action.step, action.stage, action.micro_batch)
        return draw._replace(noise=source.bits(*stage.release.bits_shape(samples)))

    def watch(self, stage: Stage, above: jax.Array, samples: int) -> None:
        """Counts for the device itself what of a micro-batch was clipped.

        Args:
          stage: A private stage.
          above: What its backward pass says: see ``stages.release.CLIPPED``.
          samples: Samples in the micro-batch.
        """
        assert stage.release is not None
        self._unread.append((stage.release, above, samples))
        if len(self._unread) > _MOST_UNREAD:  # the first have been ready for long
            self._read(_MOST_UNREAD // 2)

    def _read(self, count: int) -> None:
        some, self._unread = self._unread[:count], self._unread[count:]
        for release, above, samples in some:
            clips = release.activation_clip, release.gradient_clip, release.cotangent_clip
            for kind, clip, number in zip(_KINDS, clips, np.asarray(above), strict=True):
                if clip:
                    self._watch.add(kind, int(number), samples)

    def warn(self) -> None:
        """Logs, at the end of a round, which clips are never reached, or always: here alone."""
        self._read(len(self._unread))
        for text in self._watch.warnings():
            CLIP_LOG.warning("%s: %s", self._name, text)

    def gradient_noise(self, action: Action, replica: Replica, samples: int) -> Noise | None:
        """Returns the noise of a mini-batch's gradient.

        Args:
          action: The update.
          replica: Whose gradient.
          samples: Samples in the loss's mean.
        """
        release = replica.stage.release
        if release is None:
            return None
        source = self._stream(action.step, action.stage, "gradient")
        # Not the stage's share of the clip: the sum over all stages has the whole one.
        deviation = np.float32(release.noise * self._privacy.update_clip / samples)
        return Noise(source.bits(*bits_shape(replica.weights)), deviation)

    # --- releases of users --------------------------------------------------------------------

    @property
    def clip(self) -> float:
        """Norm to which the update of this round is clipped."""
        return self._clip

    def observe(self, within: jax.Array, round_: int) -> None:
        """See ``UpdateNoise``."""
        if self._privacy.clip_quantile is None:
            self._watch.add(policy.UPDATES, int(not within), 1)
            return
        self._within = WITHIN if bool(within) else CLIPPED
        if self._privacy.noise_at == "device":
            noise = self._stream(round_, "count").normal()
            self._within += self.guarantee.count_noise * noise

    @property
    def within(self) -> float:
        """What the coordinator is told of the update's norm; nothing if the clip stays."""
        return self._within

    def enter_update(self) -> None:
        """Enters in the ledger that the device's update is about to be sent, and its count."""
        self._enter(policy.update_entry(self.guarantee.cost))

    def update_noise(self, round_: int, numbers: int) -> Noise:
        """Returns the noise of a device's update.

        Args:
          round_: The round.
          numbers: Numbers in the update.
        """
        source = self._stream(round_, "update")
        deviation = np.float32(self.guarantee.noise * self._clip)
        return Noise(source.bits(*bits_shape(numbers)), deviation)

    def _stream(self, *what: object) -> NoiseSource:
        """Returns where the bits for something come from."""
        if not self._privacy.reproducible:
            return self._source
        return NoiseSource(reproducible_key(self._config.seed, self._name, *what))
