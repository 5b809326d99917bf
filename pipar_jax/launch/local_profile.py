"""Profiles the hosts of a run on this machine, before the run.

Each distinct host (cores and platform) is measured in its own process, set up as in a run; with
tuner.times=predicted it only times the reference layers. Times are multiplied by emulated
slowdowns. Links have their emulated rates; the cost of a message and of waking up for it is
measured over loopback.
"""

from __future__ import annotations

import dataclasses
import sys

from comms.emulation.shaping import LinkShape
from pipar_jax import config as configuration
from pipar_jax import data as datasets
from pipar_jax.config import Config, HostSpec
from pipar_jax.config.codec_candidates import candidates_of
from pipar_jax.cost_model.costs import LinkModel
from pipar_jax.cost_model.profile import DeviceProfile, HostProfile, NodeProfile, Profile
from pipar_jax.disk.json_text import JsonObject
from pipar_jax.launch.pinning import run_pinned
from pipar_jax.launch.process import claim_platform, set_environment
from pipar_jax.methods.registry import hosts_of
from pipar_jax.profiling.link_delay import measure_delay_s
from pipar_jax.protocol.values import SIGNATURE
from pipar_jax.schedule.plan import COORDINATOR

#: Size of the messages with which wake-ups are timed.
PROBE_BYTES = 4096
#: Seconds between two lines of progress.
SAID_S = 5.0


def profile_here(config: Config) -> Profile:
    """Returns the profile of a configuration's hosts, all emulated on this machine.

    Args:
      config: Resolved configuration.

    Raises:
      DataError: The data cannot be read.
      RunError: A measuring process failed.
    """
    from pipar_jax.profiling.codec_times import measure_codecs, weight_ratio
    from pipar_jax.profiling.kept_times import Measured
    from pipar_jax.profiling.rehearsal import measure_message_s
    from pipar_jax.profiling.unit_times import as_configured

    test = datasets.load_server(config)
    signature = test.signature(config.model.weight_dtype)
    known: dict[tuple[frozenset[int], str, bool], Measured] = {}
    hosts = hosts_of(config)

    def measured(name: str) -> Measured:
        key = hosts[name].cores, hosts[name].platform, hosts[name].slowdown.emulated
        if key not in known:
            _say(f"measuring {name}")
            values = run_pinned(
                _measure, configuration.to_dict(config), name, SIGNATURE.write(signature)
            )
            known[key] = Measured.from_dict(values)
        return known[key]

    def slowed(name: str) -> HostProfile:
        return as_configured(measured(name).host, hosts[name])

    def links(host: HostSpec) -> tuple[LinkModel, LinkModel]:
        up, down = (
            LinkModel.of(dataclasses.replace(shape, delay_s=shape.delay_s + wake_s), message_s)
            for shape in (host.up, host.down)
        )
        return up, down

    wake_s = measure_delay_s(LinkShape(), PROBE_BYTES)
    message_s = measure_message_s()
    devices = [
        DeviceProfile(slowed(name), _samples(config, hosts[name].index), *links(hosts[name]))
        for name in hosts.devices
    ]
    nodes = [NodeProfile(slowed(name), *links(hosts[name])) for name in hosts.nodes]
    codecs = measure_codecs(candidates_of(config, config.model.name), config.aggregation.codec)
    return Profile(
        model=config.model.name,
        batch_size=config.data.batch_size,
        units=measured(COORDINATOR).units,
        server=slowed(COORDINATOR),
        devices=tuple(devices),
        nodes=tuple(nodes),
        codecs=codecs,
        window_bytes=config.pipeline.window_mb * 1e6,
        weight_ratio=weight_ratio(config.aggregation.codec, codecs),
        target_bytes=tuple(target.nbytes for target in signature.targets.values()),
        side_bytes={name: side.nbytes for name, side in signature.sides.items()},
    )


def _samples(config: Config, index: int) -> int:
    """Returns the samples that a device trains on in an epoch; an additional one as the last."""
    samples = len(datasets.load_device(config, min(index, config.devices.count - 1)).train)
    batch = config.data.batch_size
    return samples // batch * batch if config.data.drop_last else samples


def _measure(values: JsonObject, name: str, signature: JsonObject) -> JsonObject:
    """Measures a host; runs in its own process, which has not loaded jax before."""
    config = configuration.from_dict(values)
    set_environment(config, name)
    claim_platform(hosts_of(config), name)
    from pipar_jax.profiling.unit_times import (
        measure_host,
        measure_reference,
        predicted_host,
        sizes_of,
    )
    from pipar_jax.runtime.setup import build_model, set_up_jax
    from pipar_jax.training.compile import now_and_then

    set_up_jax(config.model)
    model = build_model(config, SIGNATURE.read(signature, "signature"))
    sizes = sizes_of(config.tuner.sizes, config.data.batch_size)
    if config.tuner.times == "predicted":
        reference = measure_reference(config.optimizer, config.aggregation, config.seed)
        return predicted_host(config, model, sizes, reference).to_dict()

    def told(done: int, of: int) -> None:
        _say(f"measuring {name}: {done} of {of} units")

    in_turns = not hosts_of(config)[name].slowdown.emulated
    said = now_and_then(told, SAID_S)
    return measure_host(config, model, sizes, told=said, in_turns=in_turns).to_dict()


def _say(line: str) -> None:
    """Prints a line of progress on standard error."""
    print(line, file=sys.stderr, flush=True)
