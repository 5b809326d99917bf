"""What other hosts receive of a device's samples: activations, clipped, noised and coded."""

from __future__ import annotations

from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

import stages
from comms import parse_codec
from comms.arrays import Array
from pipar_jax.config import Config, PrivacyConfig
from pipar_jax.errors import ConfigError
from pipar_jax.privacy import policy
from pipar_jax.privacy.noise import NoiseSource, reproducible_key
from pipar_jax.runtime.stage_releases import stage_releases
from pipar_jax.schedule.plan import DevicePlan
from stages import Model, Stage, Variables


class Interceptor:
    """Computes what leaves a device at its first cut, as the run of a configuration would send it.

    Args:
      config: Resolved configuration.
      model: The whole model, without side inputs on the device.
      plan: The device's part of the plan.
      params: Weights by unit and path.
      state: Batch statistics likewise.

    Raises:
      ConfigError: No activation leaves the device, or its noise cannot be told.
    """

    def __init__(
        self, config: Config, model: Model, plan: DevicePlan, params: Variables, state: Variables
    ) -> None:
        if not policy.has_cut(plan.hosts):
            raise ConfigError(
                f"method={config.method} sends no activations: choose a method with a cut, such as "
                "--config.method=pipar"
            )
        #: The noise multiplier; 0 without privacy.
        self.noise = noise_of(config, plan)
        releases = stage_releases(config.privacy, self.noise, plan, model) if self.noise else {}
        self._stage: Stage = stages.split(model, plan.cuts, releases=releases)[0]
        if self._stage.sides:
            raise ConfigError(
                f"units {list(self._stage.unit_names)} on the device take side inputs, which leave "
                "it as they are: there is nothing to measure at such a cut"
            )
        self._params, self._state = (
            stages.select(self._stage, params), stages.select(self._stage, state)
        )  # fmt: skip
        self.codec = plan.codecs[0].activation
        self._chosen, self._parameter = parse_codec(self.codec)
        self._seed, self._step = config.seed, 0
        key = reproducible_key(config.seed, "interception") if config.privacy.reproducible else None
        self._source = NoiseSource(key)

    @property
    def unit(self) -> str:
        """The unit above the cut."""
        return self._stage.unit_names[-1]

    def receive(self, x: Array) -> Array:
        """Returns the activations that a mini-batch sends, with new noise at every call.

        Args:
          x: Inputs [samples, …] as the network takes them.

        Returns:
          [samples, …] as they are decoded.
        """
        draw = stages.make_draw(len(x), seed=self._seed, step=self._step)
        self._step += 1
        release = self._stage.release
        if release is not None:
            draw = draw._replace(noise=self._source.bits(*release.bits_shape(len(x))))
        y, *_ = self._stage.forward(self._params, self._state, jnp.asarray(x), draw)
        sent = np.ascontiguousarray(y)
        payload = self._chosen.encode(sent, self._parameter)
        return self._chosen.decode(payload, sent.dtype, sent.shape, self._parameter)


def noise_of(config: Config, plan: DevicePlan) -> float:
    """Returns the noise multiplier of a device of a run; 0 without privacy.

    Raises:
      ConfigError: It depends on how many samples the device has.
    """
    privacy: PrivacyConfig = config.privacy
    if not privacy.on:
        return 0.0
    if privacy.noise is None and config.run.rounds:
        raise ConfigError(
            "with run.rounds the noise for privacy.epsilon depends on the devices' samples: give "
            "the noise itself with privacy.noise, or set run.rounds=0"
        )
    return policy.guarantee(privacy, plan.hosts, config.epochs).noise


def activations(
    model: Model, params: Variables, state: Variables, x: Array, sides: Mapping[str, Array]
) -> list[Array]:
    """Returns what would cross every position between two units, nothing clipped or noised.

    Args:
      model: The whole model.
      params: Weights by unit and path.
      state: Batch statistics likewise.
      x: Inputs [samples, …] as the network takes them.
      sides: Side inputs by name.

    Returns:
      The output of each unit, [samples, …], the last one's included.
    """
    made = []
    y = jnp.asarray(x)
    given = {name: jnp.asarray(one) for name, one in sides.items()}
    for stage in stages.split(model, range(1, len(model.units))):
        own, statistics = stages.select(stage, params), stages.select(stage, state)
        y = stage.predict(own, statistics, y, given)
        made.append(np.asarray(y))
    return made
