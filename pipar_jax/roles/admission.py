"""The identity of a device or compute node that joins, and whether it may be admitted."""

from __future__ import annotations

import dataclasses
import json

import pipar_jax
from comms import Message
from comms.wire.bounded_json import one_line
from pipar_jax.config import Config, difference, from_dict, to_json
from pipar_jax.data import Loader
from pipar_jax.data.published import PUBLIC_SOURCES
from pipar_jax.disk.json_text import JsonObject
from pipar_jax.errors import ConfigError, ProtocolError
from pipar_jax.methods.registry import hosts_of
from pipar_jax.protocol import messages, registry
from pipar_jax.protocol.messages import JoinDevice, JoinNode
from pipar_jax.protocol.values import MOST_SPANS
from pipar_jax.protocol.wire_fields import MOST_WHOLE, shown
from pipar_jax.schedule.plan import COORDINATOR, HandOn, host_index, is_node
from stages import Model


@dataclasses.dataclass(frozen=True)
class Identity:
    """The identity that a device or a compute node reports.

    Attributes:
      name: Its name, such as ``d0`` or ``n1``.
      samples: Samples that it trains on in an epoch; 0 for a node.
      steps: Steps in its epoch; 0 for a node.
      address: Host and port at which a node's neighbours reach it.
      fingerprint: What tells its samples from others; empty for a node.
      spent: What the releases of a private device's ledger come to, as mu**2.
      epsilon: Their epsilon.
    """

    name: str
    samples: int = 0
    steps: int = 0
    address: tuple[str, int] | None = None
    fingerprint: str = ""
    spent: float = 0.0
    epsilon: float = 0.0

    @property
    def index(self) -> int:
        """Its index among the devices or nodes."""
        return host_index(self.name)


def device_join(
    config: Config, name: str, loader: Loader, model: Model, fingerprint: str | None = None
) -> JoinDevice:
    """Returns the first message of a device.

    Args:
      config: Its configuration.
      name: Its name.
      loader: Its samples.
      model: Its model.
      fingerprint: What tells its samples from others; None for their plain fingerprint.
    """
    return JoinDevice(
        messages.VERSION,
        pipar_jax.__version__,
        name,
        json.loads(to_json(config)),
        loader.samples_per_epoch,
        loader.steps_per_epoch,
        model.signature,
        describe(model),
        fingerprint or loader.fingerprint(),
    )


def node_join(config: Config, name: str, address: tuple[str, int]) -> JoinNode:
    """Returns the first message of a compute node.

    Args:
      config: Its configuration.
      name: Its name.
      address: Where its neighbours reach it.
    """
    version = pipar_jax.__version__
    return JoinNode(messages.VERSION, version, name, json.loads(to_json(config)), address)


def describe(model: Model) -> JsonObject:
    """Returns every unit's variables with shape and dtype, to compare models by."""
    return {
        unit.name: {
            path: f"{one.dtype}{list(one.shape)}"
            for path, one in sorted({**unit.params, **unit.state}.items())
        }
        for unit in model.units
    }


def read(
    message: Message, config: Config, model: Model
) -> tuple[JoinDevice | JoinNode | None, str | None]:
    """Returns the request in an unknown peer's first message, and why it is refused, or None.

    Args:
      message: The message received over its link.
      config: The coordinator's configuration.
      model: The coordinator's model.
    """
    version = message.body.get("control_version")
    if version is not None and version != messages.VERSION:  # its fields may be others too
        return None, (
            f"it runs version {shown(message.body.get('version'))} (control messages "
            f"{shown(version)}), the coordinator {pipar_jax.__version__} ({messages.VERSION}): "
            "install the same version on both"
        )
    try:
        asked = registry.decode(message, registry.Sender.HOST, "it")
    except ProtocolError as error:
        return None, str(error)
    if not isinstance(asked, JoinDevice | JoinNode):
        return None, f"its first message is {registry.kind_of(type(asked)).name!r}, expected a join"
    return asked, why_not_join(asked, config, model)


def why_not_join(asked: JoinDevice | JoinNode, config: Config, model: Model) -> str | None:
    """Returns why a host cannot take part, or None.

    Args:
      asked: Its first message.
      config: The coordinator's configuration.
      model: The coordinator's model.
    """
    if (reason := _unknown_name(asked.name, config)) is not None:
        return reason
    if is_node(asked.name) != isinstance(asked, JoinNode):
        return f"its name is {asked.name!r}, but it joins as another kind of host"
    try:
        theirs = from_dict(asked.config)
        ours, their = config.devices, theirs.devices
        if ours.count != their.count:  # before anything is done for each of them
            differing = [f"devices.count ({ours.count!r} here, {shown(their.count)} there)"]
        elif ours.more != their.more:
            differing = [f"devices.more ({ours.more!r} here, {shown(their.more)} there)"]
        else:
            differing = difference(config, theirs)
    except (ConfigError, TypeError, ValueError, AttributeError, KeyError) as error:
        return f"its configuration cannot be read: {_short(str(error))}"
    if differing:
        return (
            f"its configuration differs from the coordinator's in {_short(', '.join(differing))}: "
            "start both with the same preset and flags"
        )
    if isinstance(asked, JoinNode):
        return None
    return _odd_model(asked, model) or _odd_counts(asked, config)


def _odd_model(asked: JoinDevice, model: Model) -> str | None:
    """Returns why a device's model does not fit, or None."""
    ours, theirs = describe(model), asked.units
    if theirs != ours:
        unit = next((u for u in [*ours, *theirs] if ours.get(u) != theirs.get(u)), "order")
        return (
            f"its model differs: unit {shown(unit)} is {shown(ours.get(unit))} here and "
            f"{shown(theirs.get(unit))} there (samples are {model.signature} and "
            f"{asked.signature}, classes {model.classes} and {asked.signature.classes})"
        )
    if asked.signature != model.signature:
        return (
            f"its samples differ: {asked.signature} and {asked.signature.classes} classes, "
            f"expected {model.signature} and {model.classes}"
        )
    return None


def _odd_counts(asked: JoinDevice, config: Config) -> str | None:
    """Returns why a device's samples and steps contradict the configuration, or None."""
    samples, steps, data, epochs = asked.samples, asked.steps, config.data, config.epochs
    if not (samples and steps):
        return f"it has no data to train on: {samples} samples, {steps} steps"
    most = data.max_samples
    if data.source in PUBLIC_SOURCES and data.train_samples:
        most = min(most, data.train_samples)
    if samples > most:
        return (
            f"it reports {samples} samples, at most {most} are accepted: raise "
            "data.max_samples if it has that many"
        )
    whole = samples % data.batch_size == 0
    expected = -(-samples // data.batch_size)
    if steps != expected or (data.drop_last and not whole):
        rest = ", and none left over" if data.drop_last else ""
        return (
            f"it reports {steps} steps for {samples} samples in mini-batches of "
            f"{data.batch_size}, expected {expected}{rest}"
        )
    if steps * epochs > MOST_WHOLE:
        return (
            f"its {steps} steps an epoch come to {steps * epochs} in {epochs} "
            f"epochs, at most {MOST_WHOLE} can be counted: lower epochs"
        )
    places = hosts_of(config).places
    if config.pipeline.hand_on == HandOn.STEP and steps * places > MOST_SPANS:
        return (
            f"its {steps} steps an epoch would come to {steps * places} turns in a round of "
            f"{places} devices, at most {MOST_SPANS} can be told: set pipeline.hand_on=epoch"
        )
    return None


def _short(text: str) -> str:
    """Returns a text with a peer's words, shortened, on a single printable line."""
    return one_line(text if len(text) <= 400 else f"{text[:400]}…")


def _unknown_name(name: str, config: Config) -> str | None:
    """Returns why a host of this name is not expected, or None."""
    hosts = hosts_of(config)
    if name in hosts and name != COORDINATOR:
        return None
    count, more = config.devices.count, config.devices.more
    kind, known = "device", hosts.devices
    field = f"devices.count={count}" + (f" and devices.more={more}" if more else "")
    if is_node(name):
        kind, known, field = "node", hosts.nodes, f"nodes.count={config.nodes.count}"
    there = f"{known[0][1:]} to {known[-1][1:]}" if known else "there are none"
    return f"its name is {shown(name)}, but {field}: start it with an index of a {kind} ({there})"


def identity(asked: JoinDevice | JoinNode) -> Identity:
    """Returns the identity of an accepted device or node."""
    if isinstance(asked, JoinNode):
        return Identity(asked.name, address=asked.address)
    return Identity(
        asked.name,
        asked.samples,
        asked.steps,
        fingerprint=asked.fingerprint,
        spent=asked.spent,
        epsilon=asked.epsilon,
    )
