"""Whole runs in one process: what they leave, how they are scheduled, how they fail."""

from __future__ import annotations

import dataclasses
import threading

import numpy as np
import pytest
from safetensors.numpy import load_file

import pipar_jax
import stages
from pipar_jax.aggregation.rules import RULES
from pipar_jax.errors import ConfigError, DataError, JoinError, PeerError, PiparError, RunError
from pipar_jax.launch import certificates
from pipar_jax.launch.api import run_here, train
from pipar_jax.launch.finished_run import load
from pipar_jax.methods.resolution import resolve
from pipar_jax.roles.participants import run_device
from pipar_jax.roles.server import run_server
from pipar_jax.schedule.actions import ActionKind
from pipar_jax.schedule.policies import POLICIES
from tests.pipar_jax.runtime import support

SAMPLES = (13, 34)


@pytest.fixture(scope="module")
def network():
    return support.model(dtype="float32")


def setting(tmp_path, method="pipar", **values):
    made = support.config(tmp_path, SAMPLES, method=method, dtype="float32")
    made.pipeline.cut, made.pipeline.micro_batches = 2, 3
    for path, value in values.items():
        group, _, field = path.rpartition("__")
        target = made
        for name in filter(None, group.split("__")):
            target = getattr(target, name)
        setattr(target, field, value)
    return made


def test_a_run_can_be_loaded_and_predicts(tmp_path):
    """The library's front door, with a model and data of one's own."""
    network = support.model("cnn", "float32")
    made = setting(tmp_path, model__name="cnn")
    data = support.datasets(SAMPLES)
    events = []
    run = train(made, network, data, on_event=events.append)
    assert run.score() == pytest.approx(np.mean(run.predict(data[-1].test.x)
                                                 == data[-1].test.labels))  # fmt: skip
    assert run.summary["epoch_seconds"] > 0
    assert [e["event"] for e in events][-1] == "run_finished"
    again = load(run.folder)  # without the model: it is one that stages.build knows
    np.testing.assert_array_equal(again.outputs(data[-1].test.x),
                                  run.outputs(data[-1].test.x))  # fmt: skip
    assert again.config.method == "pipar"


def test_the_keys_of_saved_weights_do_not_depend_on_the_cut(network, tmp_path):
    keys = []
    for method, cut in (("fl", 1), ("sl", 1), ("pipar", 2)):
        made = setting(tmp_path / f"{method}{cut}", method, pipeline__cut=cut)
        run = support.trained(made, SAMPLES, network)
        keys.append(sorted(load_file(run.folder / "weights.safetensors")))
    assert keys[0] == keys[1] == keys[2]
    assert all(key.split("/")[0] in network.unit_names for key in keys[0])


@pytest.mark.parametrize("method", ["sl", "pipar"])
def test_idle_shares_are_those_of_the_trace(network, method, tmp_path):
    made = setting(tmp_path, method, aggregation__every="epoch", epochs=2)
    run = support.trained(made, SAMPLES, network)
    trace = run.trace()
    assert len(trace.rounds) == made.epochs
    for interval in trace.rounds:
        for host in ("server", "d0", "d1"):
            assert 0 <= trace.idle_share(host, interval) <= 1
    finished = [e for e in run.metrics if e["event"] == "round_finished"]
    for event, interval in zip(finished, trace.rounds, strict=True):
        for host, share in event["idle"].items():
            assert share == pytest.approx(trace.idle_share(host, interval), abs=0.02), host


@pytest.mark.parametrize("method", ["sl", "pipar"])
def test_each_round_tells_what_every_link_carried_and_waited_for(network, method, tmp_path):
    made = setting(tmp_path, method, aggregation__every="epoch", epochs=2)
    made.pipeline.activation_codec = "bfloat16"
    made.devices.defaults.link = "50/50"
    traced = support.trained(made, SAMPLES, network)
    finished = [e for e in traced.metrics if e["event"] == "round_finished"]
    for event in finished:
        ways = {(row["source"], row["target"]): row for row in event["links"]}
        assert set(ways) == {("d0", "server"), ("server", "d0"), ("d1", "server"), ("server", "d1")}
        for row in ways.values():
            assert row["bytes"] > row["payload_bytes"] > 0 and row["messages"] > 0
            assert row["frames"] >= row["messages"]
            assert row["queued_peak_bytes"] > 0 and row["rtt_s"] > 0
            assert row["queue_s"] >= 0 and row["repeated_frames"] == row["reconnects"] == 0
        up, down = ways["d1", "server"], ways["server", "d1"]
        assert up["payload_bytes"] < up["raw_bytes"]
        assert down["payload_bytes"] == down["raw_bytes"]
        assert sum(row["bytes"] for row in ways.values()) == (
            event["bytes_up"] + event["bytes_down"])  # fmt: skip
    # The trace belongs to no round: the same without one, but for the digits of some numbers.
    made.run.trace, made.run.dir = "none", str(tmp_path / "bare")
    bare = support.trained(made, SAMPLES, network)
    assert payload_up(bare) == pytest.approx(payload_up(traced), abs=500)


def payload_up(run):
    return sum(row["payload_bytes"] for event in run.metrics if event["event"] == "round_finished"
               for row in event["links"] if row["target"] == "server")  # fmt: skip


def weights(run):
    return {f"{u}/{p}": np.asarray(a) for u, arrays in run.params.items()
            for p, a in arrays.items()}  # fmt: skip


def test_neither_policy_nor_credit_nor_link_changes_the_weights(network, tmp_path):
    settings = [{"pipeline__dispatch": name} for name in POLICIES]
    # Less credit than one activation needs: each goes alone.
    settings.append({"pipeline__window_mb": 0.0001})
    found = []
    for index, values in enumerate(settings):
        made = setting(tmp_path / str(index), **values)
        made.devices.overrides = {0: {"link": "50/50/2ms"}}
        found.append(weights(support.trained(made, SAMPLES, network)))
    for other in found[1:]:
        for key, array in found[0].items():
            np.testing.assert_array_equal(array, other[key])


def test_a_host_that_rematerialises_trains_the_same(network, tmp_path, monkeypatch):
    asked, split = [], stages.split

    def asking(model, cuts=(), **options):
        asked.extend(options.values())  # whoever evaluates keeps no residuals and asks for nothing
        return split(model, cuts, **options)

    monkeypatch.setattr(stages, "split", asking)  # as the hosts call it
    plain = weights(support.trained(setting(tmp_path / "plain"), SAMPLES, network))
    assert not any(asked)
    made = setting(tmp_path / "again", server__rematerialise=True)
    made.devices.overrides = {1: {"rematerialise": True}}
    asked.clear()
    again = weights(support.trained(made, SAMPLES, network))
    assert any(asked) and not all(asked)  # the server and one device, not the other
    for key, array in plain.items():
        np.testing.assert_allclose(again[key], array, rtol=1e-5, atol=1e-7)


@pytest.mark.soak
def test_emulated_slowness_stretches_computations(network, tmp_path):
    plain, slow = (
        support.trained(
            setting(tmp_path / str(factor), devices__defaults__slowdown=float(factor)),
            SAMPLES,
            network,
        ).trace()
        for factor in (1, 1000)
    )

    def median(trace, kind):
        rows = [r for r in trace.hosts["d1"] if r.action.kind == kind and r.samples in (2, 0)]
        return np.median([r.end_s - r.start_s for r in rows])

    for kind in ("F", "B", "U"):
        # Less than a thousand times, since threads of this process disturb the plain run.
        assert median(slow, kind) > 3 * median(plain, kind), kind


@pytest.mark.sampled(3, 1)
@pytest.mark.parametrize("rule", RULES)
def test_every_rule_trains(network, rule, tmp_path):
    made = setting(tmp_path, aggregation__rule=rule, aggregation__proximal_mu=0.01, epochs=3)
    made.aggregation.learning_rate = 1.0 if rule.startswith("fedavg") else 0.05
    if rule != "fedavg":
        made.aggregation.momentum = 0.5
    run = support.trained(made, SAMPLES, network)
    losses = [e["loss"] for e in run.metrics if e["event"] == "round_finished"]
    assert np.mean(losses[-3:]) < np.mean(losses[:3])


def test_handing_on_costs_the_optimiser_state_too(network, tmp_path):
    sent = []
    for momentum in (0.0, 0.9):
        made = setting(tmp_path / str(momentum), "sl", optimizer__momentum=momentum, epochs=2)
        sent.append(support.trained(made, SAMPLES, network).summary["bytes_up"])
    part = sum(a.nbytes for unit in network.unit_names[:2]
               for a in support.model(dtype="float32").init(0)[0][unit].values())  # fmt: skip
    assert sent[1] - sent[0] == pytest.approx(part * 4, rel=0.05)  # four turns in two epochs


@pytest.mark.soak
def test_codecs_cost_fewer_bytes_and_little_accuracy(network, tmp_path):
    found = {}
    for codec in ("raw", "bfloat16", "int8", "bits:8", "bits:lossless"):
        made = setting(tmp_path / codec.replace(":", "-"), pipeline__activation_codec=codec,
                       pipeline__cotangent_codec=codec, epochs=2)  # fmt: skip
        found[codec] = support.trained(made, SAMPLES, network)
    up = {codec: payload_up(run) for codec, run in found.items()}
    assert up["int8"] < up["bfloat16"] < up["raw"]
    for codec, worst in (
        ("bfloat16", 0.02),
        ("int8", 0.05),
        ("bits:8", 0.05),
        ("bits:lossless", 0),
    ):
        for key, array in weights(found["raw"]).items():
            if "kernel" not in key:
                continue  # biases start at zero: they are nothing but their changes
            moved = np.abs(weights(found[codec])[key] - array).max() / np.abs(array).max()
            assert moved <= worst, (codec, key)
    # Something must have been coded, or the bytes would be those of labels and headers alone.
    assert any(
        (weights(found["int8"])[key] != array).any() for key, array in weights(found["raw"]).items()
    )


def test_in_bfloat16_half_the_bytes_of_activations_travel_and_weights_stay_float32(tmp_path):
    found = {}
    for dtype in ("float32", "bfloat16"):
        made = setting(tmp_path / dtype, model__dtype=dtype)
        found[dtype] = support.trained(made, SAMPLES, support.model(dtype=dtype))
    for kind in (ActionKind.RECEIVE_FORWARD, ActionKind.RECEIVE_BACKWARD):
        sent = [
            sum(row.nbytes for _, row in found[dtype].trace().rows() if row.action.kind == kind)
            for dtype in ("float32", "bfloat16")
        ]
        assert sent[0] == 2 * sent[1] > 0, kind
    for key, array in weights(found["float32"]).items():
        other = weights(found["bfloat16"])[key]
        assert other.dtype == np.float32
        if "kernel" in key:
            assert 0 < np.abs(other - array).max() < 0.02 * np.abs(array).max()


def test_weights_can_travel_coded(network, tmp_path):
    sent = {}
    for codec in ("raw", "bfloat16"):
        made = setting(tmp_path / codec, "fl", aggregation__codec=codec)
        sent[codec] = support.trained(made, SAMPLES, network).summary["bytes_up"]
    assert sent["bfloat16"] < 0.7 * sent["raw"]


def test_a_run_over_tls_with_certificates_for_both(network, tmp_path):
    files = certificates.make_authority(tmp_path / "pem")
    names = ("server", "d0", "d1")  # all hosts of a run in one process
    certificates.add_certificate(files, "host", ["127.0.0.1", *names])
    made = setting(tmp_path / "run")
    made.network.authority = str(files.authority)
    made.network.certificate = str(files.certificate("host"))
    made.network.key = str(files.key("host"))
    made.network.require_certificate = True
    run = support.trained(made, SAMPLES, network)
    assert run.summary["event"] == "run_finished"


def test_one_device_alone(network, tmp_path):
    for method in ("fl", "sl", "pipar"):
        made = support.config(tmp_path / method, (20,), method=method, dtype="float32")
        made.pipeline.hand_on = "step"
        run = support.trained(made, (20,), network)
        assert run.summary["event"] == "run_finished"


# --- failures: one error that says what and where, in bounded time, nothing left running ----------


def test_a_device_whose_data_fail_ends_the_run(network, tmp_path, monkeypatch):
    made = setting(tmp_path)

    def broken(self, step):
        if step == 2:
            raise DataError("the shard of this device is torn at sample 14")
        return original(self, step)

    from pipar_jax.data import Loader

    original = Loader.batch
    monkeypatch.setattr(Loader, "batch", broken)
    with pytest.raises(DataError, match="torn at sample 14"):
        support.trained(made, SAMPLES, network)


def test_labels_that_the_model_does_not_know_are_not_trained_on(network, tmp_path):
    data = support.datasets(SAMPLES)
    bad = dataclasses.replace(data[0], classes=12)
    with pytest.raises(PiparError):
        train(setting(tmp_path, model__name="nonsense"), None, [bad, *data[1:]])


class Serving:
    """A server on a thread of its own."""

    def __init__(self, config, network):
        self.events, self.errors = [], []
        self.stop = threading.Event()
        self._more = threading.Condition()
        self._thread = threading.Thread(
            target=self._role, args=(config, network), name="pipar-test-server"
        )
        self._thread.start()
        where = self.wait_for("listening")
        self.address = where["host"], where["port"]

    def _role(self, config, network):
        data = support.datasets((1,))[-1]
        try:
            run_server(config, on_event=self._tell, model=network, data=data, stop=self.stop)
        except PiparError as error:
            self.errors.append(error)

    def _tell(self, event):
        with self._more:
            self.events.append(event)
            self._more.notify_all()

    def wait_for(self, kind, within_s=60.0):
        """Returns the first event of a kind."""

        def found():
            return next((e for e in self.events if e["event"] == kind), None)

        with self._more:
            event = self._more.wait_for(found, within_s)
        assert event is not None, f"no {kind!r} within {within_s} s: {self.events} {self.errors}"
        return event

    def join(self, within_s=60.0):
        """Waits for the server's end and returns its errors."""
        self._thread.join(within_s)
        assert not self._thread.is_alive()
        return self.errors


def test_devices_that_do_not_join_in_time_are_named(network, tmp_path):
    server = Serving(resolve(setting(tmp_path, network__join_timeout_s=0.2)), network)
    (error,) = server.join()
    assert isinstance(error, JoinError)
    assert "d0, d1 of 2 hosts did not join within 0.2 s" in str(error)


def test_a_device_with_another_configuration_is_refused_by_name_of_the_field(network, tmp_path):
    made = resolve(setting(tmp_path))
    server = Serving(made, network)
    address = server.address
    other = dataclasses.replace(made, seed=7)
    with pytest.raises(JoinError, match=r"differs from the coordinator's in seed \(0 here, 7"):
        run_device(other, 0, address, model=network, data=support.dataset(17, 0))
    small = support.model("cnn", "float32")
    with pytest.raises(JoinError, match=r"its model differs: unit"):
        run_device(made, 1, address, model=small, data=support.dataset(17, 0))
    server.stop.set()
    (error,) = server.join()
    assert "told to stop" in str(error)
    assert [e["host"] for e in server.events if e["event"] == "refused"] == ["d0", "d1"]


def test_an_index_that_is_taken_or_does_not_exist_is_refused(network, tmp_path):
    made = resolve(setting(tmp_path))
    server = Serving(made, network)
    address = server.address
    errors = []

    def first():
        try:
            run_device(made, 0, address, model=network, data=support.dataset(17, 0))
        except PiparError as error:
            errors.append(error)

    thread = threading.Thread(target=first, name="pipar-test-device")
    thread.start()
    server.wait_for("device_joined")
    with pytest.raises(JoinError, match="device 0 has joined already"):
        run_device(made, 0, address, model=network, data=support.dataset(17, 0))
    more = resolve(dataclasses.replace(
        made, devices=dataclasses.replace(made.devices, count=3)))  # fmt: skip
    with pytest.raises(JoinError, match="its name is 'd2'"):
        run_device(more, 2, address, model=network, data=support.dataset(17, 0))
    server.stop.set()
    server.join()
    thread.join(60)
    assert isinstance(errors[0], PeerError)
    assert "the coordinator ended the run: the run was told to stop" in str(errors[0])


def test_a_server_that_is_not_there(network, tmp_path, within):
    made = resolve(setting(tmp_path, network__join_timeout_s=0.5))
    with within(10.0), pytest.raises(JoinError, match="device 0 cannot join"):
        run_device(made, 0, ("127.0.0.1", 9), model=network, data=support.dataset(17, 0))


def test_a_lost_device_ends_the_run_for_all(network, tmp_path):
    made = setting(tmp_path, epochs=200)
    stop = threading.Event()
    made = resolve(made)
    server = Serving(made, network)
    threads = []
    errors = [None, None]

    def role(index):
        own = stop if index == 0 else None
        try:
            run_device(made, index, server.address, model=network,
                       data=support.dataset(SAMPLES[index], index), stop=own)  # fmt: skip
        except PiparError as error:
            errors[index] = error

    for index in range(2):
        threads.append(threading.Thread(target=role, args=(index,), name=f"pipar-test-{index}"))
        threads[-1].start()
    server.wait_for("round_finished")
    stop.set()
    (error,) = server.join()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert isinstance(error, PeerError)
    assert "device 0" in str(error)
    assert "the coordinator ended the run" in str(errors[1])


def test_a_folder_that_is_no_run(tmp_path):
    with pytest.raises(RunError, match="is not the folder of a run"):
        pipar_jax.load(tmp_path)


def test_a_cut_beyond_the_model_is_named(network, tmp_path):
    with pytest.raises(ConfigError, match=r"pipeline.cut=99 is not a cut of this model"):
        run_here(
            resolve(setting(tmp_path, pipeline__cut=99)), network, support.datasets(SAMPLES),
            on_event=lambda event: None,
        )  # fmt: skip
