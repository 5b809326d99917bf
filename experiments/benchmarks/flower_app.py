"""A Flower app, for comparison, as the files that ``flwr run`` takes.

Flower builds an app from a folder, imports it in processes of its own, and is not installed with
this project, so that the app is kept here as text.
"""

from __future__ import annotations

from pathlib import Path

from pipar_jax.disk import files

_PROJECT = """\
[project]
name = "rounds"
version = "1.0.0"
description = "Rounds of federated averaging whose clients return their arrays at once."
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "pipar"

[tool.flwr.app.components]
serverapp = "rounds.server:app"
clientapp = "rounds.client:app"

[tool.flwr.app.config]
clients = 2
rounds = 4
megabytes = 0.4
out = ""
"""

_CLIENT = '''\
"""The client: it returns the arrays that it was sent."""

from flwr.app import Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Returns the arrays at once, as the result of one sample."""
    del context
    metrics = MetricRecord({"num-examples": 1})
    content = RecordDict({"arrays": message.content["arrays"], "metrics": metrics})
    return Message(content=content, reply_to=message)
'''

_SERVER = '''\
"""The server: FedAvg over all clients, round after round, without evaluation."""

import json
import time
from pathlib import Path

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

app = ServerApp()
#: Tensors that the weights are divided into.
TENSORS = 8


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Runs the rounds and writes their seconds."""
    config = context.run_config
    clients, megabytes = int(config["clients"]), float(config["megabytes"])
    strategy = FedAvg(fraction_evaluate=0.0, min_train_nodes=clients, min_available_nodes=clients)
    size = int(megabytes * 1e6 / 4 / TENSORS)
    arrays = ArrayRecord([np.zeros(size, np.float32) for _ in range(TENSORS)])
    while len(list(grid.get_node_ids())) < clients:
        time.sleep(0.1)
    seconds = []
    for number in range(1, int(config["rounds"]) + 1):
        began = time.monotonic()
        messages = strategy.configure_train(number, arrays, ConfigRecord(), grid)
        replies = grid.send_and_receive(messages=messages, timeout=600)
        averaged, _ = strategy.aggregate_train(number, replies)
        assert averaged is not None, "a client failed"
        arrays = averaged
        seconds.append(time.monotonic() - began)
    out = Path(str(config["out"]))
    aside = out.with_suffix(".partial")
    aside.write_text(json.dumps(seconds))
    aside.replace(out)  # whole from the moment when it is there
'''


def write(folder: Path) -> None:
    """Writes the app into a folder, which is created."""
    package = folder / "rounds"
    package.mkdir(parents=True)
    files.write_text(folder / "pyproject.toml", _PROJECT)
    modules = {"__init__": "", "client": _CLIENT, "server": _SERVER}
    for name, text in modules.items():
        files.write_text(package / f"{name}.py", text)
