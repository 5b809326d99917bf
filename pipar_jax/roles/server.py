"""The server as a role: the coordinator and the server host, in one process."""

from __future__ import annotations

import contextlib
import threading
import time
import uuid
from collections.abc import Sequence
from pathlib import Path

import stages
from comms import ChannelError, Endpoint
from pipar_jax import data as datasets
from pipar_jax.config import Config
from pipar_jax.config.checkpoints import WEIGHTS
from pipar_jax.config.cohorts import planned
from pipar_jax.config.tasks import check_scores
from pipar_jax.config.texts import whole_numbers
from pipar_jax.data import Dataset
from pipar_jax.data.fingerprint import fingerprint
from pipar_jax.disk.event_log import OnEvent
from pipar_jax.disk.json_text import JsonObject, plain
from pipar_jax.errors import Interrupted, PiparError, RunError
from pipar_jax.methods.personal_checks import check_stays
from pipar_jax.methods.resolution import check_plan
from pipar_jax.protocol import messages
from pipar_jax.protocol.values import SIGNATURE
from pipar_jax.report.environment import add_platform
from pipar_jax.report.sinks import Sinks
from pipar_jax.roles.admission import describe
from pipar_jax.roles.assembly import assemble
from pipar_jax.roles.checkpoint_store import CheckpointStore
from pipar_jax.roles.checkpoints import Checkpoints
from pipar_jax.roles.coordinator import Coordinator, Start
from pipar_jax.roles.evaluation import Evaluator
from pipar_jax.roles.mail import try_send
from pipar_jax.roles.membership import Membership
from pipar_jax.roles.past import Past, check_data, read_past
from pipar_jax.roles.run_folder import Record, RunFolder
from pipar_jax.roles.run_log import RunLog
from pipar_jax.roles.stop_rule import StopRule
from pipar_jax.runtime.host import Host
from pipar_jax.runtime.setup import channel_options, fit, set_up_jax, target_rule
from pipar_jax.schedule.plan import COORDINATOR, Plan
from stages import Model
from stages.personal import personal_names, personal_paths
from stages.trees import Variables

#: What is told often, and what a run that is resumed has told before.
_OFTEN = ("progress", "working")
_KNOWN = ("listening", "waiting", "device_joined", "node_joined", "prepared", "run_started")


def run_server(
    config: Config,
    *,
    on_event: OnEvent,
    model: Model | None = None,
    data: Dataset | None = None,
    stop: threading.Event | None = None,
    script: Sequence[Plan] = (),
    finish: threading.Event | None = None,
) -> JsonObject:
    """Conducts a run: waits for its devices, trains with them, leaves the run's folder.

    Args:
      config: Resolved configuration; the folder is ``config.run.dir / config.name``.
      on_event: Takes every event; called on several threads, one at a time.
      model: The model, if not the configured one.
      data: The test set (a test split), if not the configured one.
      stop: Ends the run when set.
      script: Plans of the rounds, from the first on; empty: as configured.
      finish: Ends the run when set, after the round under way and a checkpoint, if it keeps any.

    Returns:
      The event ``run_finished``.

    Raises:
      ConfigError: A sink of ``run.sinks`` cannot be made, or this configuration, model or test set
        is not that of the checkpoint that ``run.resume`` names.
      DataError: The test set cannot be read, is wrong, or does not fit the model.
      DiskError: The run's files cannot be written; weights are, if there is any way.
      Interrupted: ``finish`` was set, and the run has a checkpoint.
      JoinError: Devices are missing.
      PeerError: A device was lost or failed.
      RunError: This process failed.
    """
    set_up_jax(config.model)
    began_s = time.monotonic()
    # Before there is a folder: what is refused here leaves nothing behind.
    planned(config.cohort, config.devices.total)
    network, dataset = _network(config, model, data, script)
    early: list[JsonObject] = []
    past = read_past(config, network, fingerprint(dataset.test), early.append)
    scores = network.task.scores
    stop_metric = config.stop.metric or network.task.main
    stop_rule = StopRule(config.stop, stop_metric, scores[stop_metric])
    at = Path(config.run.dir) / config.name
    folder = RunFolder(at) if past is None else RunFolder(at, past.rows, past.script)
    folder.save_config(config)
    add_platform(folder.path)
    rows = () if past is None else past.rows
    record = Record(folder, (*_OFTEN, *(_KNOWN if rows else ())))
    with Sinks(config.run.sinks, folder.path) as sinks:
        tell = _Teller(record, sinks, stop_rule, on_event, began_s, rows)
        for event in early:
            tell(event)
        if names := personal_names(network):
            tell({"event": "personal", "names": names})
        if past is not None and past.kept is not None:
            unread = ["model.weights"] if config.model.weights else []
            tell({"event": "run_resumed", "rounds": past.rounds, "unread": unread})
        return _serve(
            config, network, dataset, folder, record, tell, stop or threading.Event(), script,
            Start(past, stop_rule, finish or threading.Event()),
        )  # fmt: skip


def _network(
    config: Config, model: Model | None, data: Dataset | None, script: Sequence[Plan]
) -> tuple[Model, Dataset]:
    """Returns the whole model and the test set; a user's task or network is checked only here."""
    rule = target_rule(config, model)
    dataset = (
        datasets.load_server(config, rule)
        if data is None
        else datasets.admit(
            data,
            "test",
            COORDINATOR,
            rule,
            config.data.classes,
            pad_to=whole_numbers(config.data.pad_to),
        )
    )
    network = fit(config, model, dataset, COORDINATOR)
    check_scores(config.stop, config.checkpoint, network.task)
    if not script:
        check_plan(config, network.unit_names)
    check_stays(config, script, network.unit_names, personal_paths(network))
    return network, dataset


class _Teller:
    """Passes events on, one at a time: to the run's record, its sinks, its stop rule, the caller.

    Args:
      record: What is written to the run's folder.
      sinks: Further destinations.
      stop_rule: Decides when the run ends.
      on_event: The caller's.
      began_s: When the run began, on the monotonic clock.
      rows: What the run told before it was resumed.
    """

    def __init__(
        self,
        record: Record,
        sinks: Sinks,
        stop_rule: StopRule,
        on_event: OnEvent,
        began_s: float,
        rows: Sequence[JsonObject],
    ) -> None:
        self._record, self._sinks, self._stop_rule = record, sinks, stop_rule
        self._on_event, self._lock = on_event, threading.Lock()
        for row in rows:
            stop_rule.add(row, past=True)
        self._began_s = began_s - (rows[-1]["time_s"] if rows else 0.0)

    def __call__(self, event: JsonObject) -> None:
        """Adds the time to an event and passes it on; any thread may call it."""
        with self._lock:
            event = plain({**event, "time_s": time.monotonic() - self._began_s})
            self._stop_rule.add(event)
            told = self._record.add(event)
            if self._record.keeps(event):
                self._sinks.write(event)
            if told is not None:
                self._on_event({**told, "time_s": event["time_s"]})
            self._on_event(event)


def _serve(
    config: Config,
    model: Model,
    dataset: Dataset,
    folder: RunFolder,
    record: Record,
    tell: OnEvent,
    stop: threading.Event,
    script: Sequence[Plan],
    start: Start,
) -> JsonObject:
    """Opens the endpoint and the host, runs the coordinator, and closes both whatever happens."""
    endpoint = Endpoint(
        COORDINATOR, options=channel_options(config.network, config.pipeline.window_mb)
    )
    host: Host | None = None
    members = Membership(
        config,
        model,
        tensors=lambda message: host.on_message(message) if host else None,
        wake=lambda: host.wake() if host else None,
        tell=tell,
        stop=stop,
    )
    try:
        host = Host(
            COORDINATOR,
            model,
            config,
            reply=members.links.local_reply,
            failed=members.links.local_failure,
            refuse=members.links.end_for,
            slowness=members.hosts[COORDINATOR].slowdown,
            rematerialise=config.server.rematerialise,
        )
        try:
            address = endpoint.listen(
                config.server.host,
                config.server.port,
                members.links.on_link,
                expected_peers=config.devices.total + config.nodes.count,
            )
        except ChannelError as error:
            raise RunError(
                f"the server cannot listen on {config.server.host}:{config.server.port}: {error}"
            ) from error
        tell({"event": "listening", "host": address[0], "port": address[1]})
        recorded = () if start.past is None else start.past.hosts
        assemble(members, config.cohort, config.network.join_timeout_s, recorded)
        members.actions = lambda: host.actions
        host.link_table.control.update({name: one.link for name, one in members.by_name.items()})
        return _conduct(config, model, dataset, folder, record, tell, host, members, script, start)
    except BaseException as error:
        _abort(members, _reason(error), again=isinstance(error, Interrupted))
        raise
    finally:
        if host is not None:
            host.close()
        members.close()
        endpoint.close()


def _conduct(
    config: Config,
    model: Model,
    dataset: Dataset,
    folder: RunFolder,
    record: Record,
    tell: OnEvent,
    host: Host,
    members: Membership,
    script: Sequence[Plan],
    start: Start,
) -> JsonObject:
    """Runs the coordinator once all members are there; returns the event ``run_finished``."""

    def save(params: Variables, state: Variables, rounds: int) -> None:
        tell({"event": "saving", "file": WEIGHTS})
        facts = _facts(model, dataset) | {"run": checkpoints.run, "rounds": rounds}
        folder.save_weights(model.completed(params), state, facts)

    rows = () if start.past is None else start.past.rows
    parameters = stages.parameter_count(model)
    checkpoints = _checkpoints(config, model, dataset, folder, members, tell, start.past)
    with contextlib.ExitStack() as stack:
        stack.callback(checkpoints.close)
        run_log = RunLog(config, members, folder, record, tell, parameters, model.task, rows)
        stack.callback(run_log.close)
        evaluator = Evaluator(model, dataset, config.model.weight_dtype)
        coordinator = Coordinator(
            config, model, host, members, evaluator, run_log, save, script, checkpoints, start
        )
        summary = coordinator.run()
    record.check()
    return summary


def _checkpoints(
    config: Config,
    model: Model,
    dataset: Dataset,
    folder: RunFolder,
    members: Membership,
    tell: OnEvent,
    past: Past | None,
) -> Checkpoints:
    """Returns what keeps the run on disk; a device of other data than before is refused here."""
    data = {COORDINATOR: fingerprint(dataset.test)}
    data |= {
        name: one.identity.fingerprint
        for name, one in members.by_name.items()
        if one.identity.fingerprint
    }
    run = uuid.uuid4().hex
    if past is not None and past.kept is not None:
        run = past.kept.facts["run"]
        for name, found in data.items():
            check_data(past.kept.facts["data"], name, found, folder.path)
        data = {**past.kept.facts["data"], **data}
    store = CheckpointStore(folder.path, config.checkpoint)
    better = model.task.scores.get(config.checkpoint.best, True)
    return Checkpoints(config, store, run, describe(model), data, tell, better)


def _abort(members: Membership, reason: str, *, again: bool) -> None:
    """Tells every reachable member that the run has ended.

    Args:
      members: The devices and compute nodes.
      reason: Why.
      again: Whether this process is expected to be restarted and to resume the run.
    """
    for member in members.by_name.values():
        try_send(member.link, messages.Abort(reason, again))
    for member in members.by_name.values():
        try:
            member.link.drain(0.5)
        except ChannelError:
            continue


def _reason(error: BaseException) -> str:
    """Returns what members are told of the end of a run."""
    if isinstance(error, KeyboardInterrupt):
        return "the server was interrupted"
    return str(error) if isinstance(error, PiparError) else f"the server failed: {error!r}"


def _facts(model: Model, dataset: Dataset) -> JsonObject:
    """Returns what a saved model needs beside its weights in order to predict."""
    return {
        "model": model.name,
        "recipe": model.recipe,
        "signature": SIGNATURE.write(model.signature),
        "mean": None if dataset.mean is None else dataset.mean.tolist(),
        "std": None if dataset.std is None else dataset.std.tolist(),
        "stored": dataset.test.x.dtype.name,
        "personal": personal_names(model),
    }
