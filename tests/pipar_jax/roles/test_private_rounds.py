"""What a private run counts over its parts, whoever keeps the ledgers: devices or the server."""

from __future__ import annotations

import json

import pytest

from pipar_jax.errors import RunError
from pipar_jax.methods.resolution import resolve
from pipar_jax.privacy.accountant import gaussian_epsilon, noise_for, release_cost
from pipar_jax.privacy.ledger import LEDGER
from pipar_jax.roles.private_rounds import ServerNoise
from tests.pipar_jax.runtime import support
from tests.pipar_jax.runtime.test_private_runs import epsilons, of_users, rounds

pytestmark = pytest.mark.usefixtures("double")


def ledger_of(run, noise_at, index):
    """The lines of a device's ledger, which whoever adds the noise keeps."""
    folder = run.folder / "hosts" / ("server" if noise_at == "server" else "") / f"d{index}"
    return [json.loads(line) for line in (folder / LEDGER).read_text().splitlines()]


@pytest.mark.sampled(2)
@pytest.mark.parametrize("noise_at", ["device", "server"])
def test_what_was_released_after_the_last_checkpoint_counts(noise_at, tmp_path):
    """The budget is for four rounds: after a crash in the third the second half has one left."""
    made, samples = of_users(tmp_path, noise_at=noise_at, noise=None, epsilon=4.0)
    made.epochs, made.checkpoint.every_rounds, made.run.resume = 4, 2, "auto"
    support.crash(made, samples, 2, support.model())
    run = support.trained(made, samples, support.model())
    cost = release_cost(noise_for(4.0, made.privacy.delta, 4))
    (promise,) = [event for event in run.metrics if event["event"] == "private"][1:]
    released = gaussian_epsilon(3 * cost, made.privacy.delta)
    assert promise["epsilon"] == {name: pytest.approx(released) for name in ("d0", "d1")}
    assert [one["round"] for one in rounds(run)] == [0, 1, 2]
    (stopped,) = [event for event in run.metrics if event["event"] == "stopped"]
    assert "round 3 would bring device 0 above privacy.epsilon=4" in stopped["reason"]
    assert epsilons(run) == {name: pytest.approx(4.0, rel=1e-6) for name in ("d0", "d1")}
    assert [len(ledger_of(run, noise_at, index)) for index in (0, 1)] == [4, 4]


@pytest.mark.parametrize("noise_at", ["device", "server"])
def test_a_budget_that_is_spent_is_not_given_anew_to_a_longer_run(noise_at, tmp_path):
    """Its noise is calibrated to more rounds, and each costs less than those that are over did."""
    made, samples = of_users(tmp_path, noise_at=noise_at, noise=None, epsilon=4.0)
    made.checkpoint.every_rounds, made.run.resume = 1, "auto"
    run = support.trained(made, samples, support.model())
    made.epochs = 4
    with pytest.raises(RunError, match=r"above privacy\.epsilon=4.* ends before its first round"):
        support.trained(made, samples, support.model())
    assert [len(ledger_of(run, noise_at, index)) for index in (0, 1)] == [2, 2]
    assert (run.folder / "weights.safetensors").is_file()  # what there was is as it was


@pytest.mark.parametrize("noise_at", ["device", "server"])
def test_a_users_ledger_that_is_gone_ends_the_run_whoever_keeps_it(noise_at, tmp_path):
    made, samples = of_users(tmp_path, noise_at=noise_at)
    made.checkpoint.every_rounds, made.run.resume = 1, "auto"
    run = support.trained(made, samples, support.model())
    place = "server/d1" if noise_at == "server" else "d1"
    (run.folder / "hosts" / place / LEDGER).unlink()
    made.epochs = 3
    says = rf"device 1 cannot go on: its ledger comes to epsilon 0.* in the folder hosts/{place},"
    with pytest.raises(RunError, match=says):
        support.trained(made, samples, support.model())


def test_the_server_adds_no_update_beyond_a_budget(tmp_path):
    """Whatever the coordinator has counted: nothing is entered, and so nothing released."""
    made, _ = of_users(tmp_path, noise_at="server", noise=None, epsilon=4.0)
    noise = ServerNoise(resolve(made))
    for devices in ((0, 1), (0,)):
        noise.devices = devices
        noise.enter_update()
    noise.devices = (1, 0)
    with pytest.raises(RunError, match=r"release device 0 beyond privacy\.epsilon=4, of which"):
        noise.enter_update()
    assert noise.epsilon(0) == pytest.approx(4.0, rel=1e-6)
    assert noise.spent(1) == pytest.approx(noise.spent(0) / 2)
    noise.close()
    again = ServerNoise(resolve(made))
    again.devices = (0,)
    with pytest.raises(RunError, match="releases of earlier parts of the run"):
        again.enter_update()
