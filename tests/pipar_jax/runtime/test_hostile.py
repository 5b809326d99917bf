"""Real links: what strangers send never reaches a run, and a member that lies ends it by name."""

from __future__ import annotations

import contextlib
import threading

import numpy as np
import pytest

from comms import ChannelError, Endpoint, Role, Tag
from pipar_jax.data import Loader
from pipar_jax.errors import ProtocolError
from pipar_jax.methods.resolution import resolve
from pipar_jax.protocol import messages, registry
from pipar_jax.roles import admission
from pipar_jax.roles.server import run_server
from pipar_jax.runtime.setup import build_model
from pipar_jax.schedule.plan import COORDINATOR
from tests.patience import PATIENCE_S
from tests.pipar_jax.runtime import support

SAMPLES = (14, 14)


def garbage(link) -> None:
    """What a link may not send that was not admitted; one of it each time."""
    tag = Tag(role=Role.ACTIVATION, device=0, stage=1, micro_batches=3, samples=3, batch_samples=7)
    link.send(tag, np.full((3, 64), np.nan, np.float32))
    link.send_control({"type": "trained", "round": 0})
    link.send_bundle("trained", {"0/params/fc1/linear/kernel": np.ones((64, 128), np.float32)},
                     {"type": "trained", "round": 0})  # fmt: skip


def test_a_stranger_s_tensors_and_weights_end_up_nowhere(tmp_path):
    network = support.model("mlp", "float32")
    made = support.config(tmp_path / "quiet", SAMPLES, dtype="float32", method="pipar")
    made.pipeline.cut, made.pipeline.micro_batches = 1, 3
    quiet = support.trained(made, SAMPLES, network)
    made.run.dir = str(tmp_path / "loud")
    over, threads, events = threading.Event(), [], []

    came = threading.Event()

    def disturb(address):
        with Endpoint("d0") as endpoint:
            while not over.wait(0.02):
                with contextlib.suppress(ChannelError):
                    link = endpoint.connect(*address, name_of_peer=COORDINATOR, timeout_s=5.0)
                    link.start(lambda message: None, lambda: None, lambda error: None)
                    garbage(link)
                    link.wait_closed(5.0)
                    came.set()

    class Events(list):
        def append(self, event):
            events.append(event)
            if event["event"] == "listening":
                address = event["host"], event["port"]
                threads.append(threading.Thread(target=disturb, args=(address,)))
                threads[-1].start()
                came.wait(PATIENCE_S)  # at least one comes before the run is over

    try:
        loud = support.trained(made, SAMPLES, network, Events())
    finally:
        over.set()
        for thread in threads:
            thread.join()
    assert support.largest_difference(loud.params, quiet.params) == 0.0
    assert [one for one in events if one["event"] == "refused"]


@pytest.mark.parametrize("lie", ["tensor", "bundle", "message", "twice"])
def test_a_member_that_lies_ends_the_run_by_its_name(tmp_path, lie):
    network = support.model("mlp", "float32")
    made = resolve(support.config(tmp_path, (14, 14), dtype="float32"))
    data = support.datasets(SAMPLES)
    network = build_model(made, data[0].signature("float32"), network)
    loader = Loader(data[0].train, None, made.data.batch_size, seed=made.seed, device=0)
    listening, threads, ended = threading.Event(), [], threading.Event()
    heard = []

    def device(address):
        with Endpoint("d0") as endpoint:
            link = endpoint.connect(*address, name_of_peer=COORDINATOR, timeout_s=PATIENCE_S)
            joined = threading.Event()
            link.start(
                lambda message: joined.set(), lambda: None,
                lambda error: (heard.append(str(error)), ended.set()),
            )  # fmt: skip
            join = admission.device_join(made, "d0", loader, network)
            registry.send(link, join)
            if lie == "twice":
                registry.send(link, join)
            ended.wait(0.2)
            with contextlib.suppress(ChannelError):
                if lie == "tensor":
                    link.send(Tag(role=Role.LABEL), np.zeros(3, np.int32))
                elif lie == "bundle":
                    registry.send_bundle(link, messages.Trained(0), {"x": np.ones(3)})
                elif lie == "message":
                    link.send_control({"type": "stored", "round": "first"})
            ended.wait(PATIENCE_S)

    def note(event):
        if event["event"] == "listening":
            threads.append(threading.Thread(target=device, args=((event["host"], event["port"]),)))
            threads[-1].start()
            listening.set()

    try:
        with pytest.raises(ProtocolError, match=r"device 0 (sent|violated) ") as error:
            run_server(made, on_event=note, model=network, data=data[-1])
    finally:
        ended.set()
        for thread in threads:
            thread.join()
    assert "\n" not in str(error.value)
