"""The attack on what a configuration sends, as a user runs it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import experiments.attack
from configs import digits
from experiments.attack import AttackFlags, draw_picture
from pipar_jax.errors import ConfigError
from pipar_jax.methods.resolution import resolve
from tests.patience import PROCESS_S

ROOT = Path(__file__).parents[2]
PRIVATE = ("--config.privacy.noise=2", "--config.privacy.activation_clip=0.5",
           "--config.privacy.update_clip=1")  # fmt: skip


@pytest.mark.soak
def test_a_step_of_the_attack(tmp_path):
    """Into the current folder, where the picture of an earlier one stays."""
    (tmp_path / "attack.png").write_text("of an earlier attack")
    done = subprocess.run(
        [sys.executable, "-m", "experiments.attack", "--config=digits", "--config.pipeline.cut=2",
         "--config.pipeline.activation_codec=int8", *PRIVATE, "--steps=1", "--samples=16",
         "--known=32"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=PROCESS_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "cut behind conv2" in done.stdout and "codec int8" in done.stdout
    assert "noise multiplier 2 at clip 0.5" in done.stdout
    assert "32 known images, 1 steps, 16 reconstructed" in done.stdout
    assert done.stdout.splitlines()[-1] == "wrote attack-2.png"
    assert (tmp_path / "attack.png").read_text() == "of an earlier attack"
    with Image.open(tmp_path / "attack-2.png") as picture:
        # Twelve digits in two rows, a gap of a pixel around each, six times as large.
        assert picture.size == (6 * (12 * 9 + 1), 6 * (2 * 9 + 1))


@pytest.mark.soak
def test_what_is_sent_without_noise_can_be_reconstructed_and_with_noise_not(tmp_path, capsys):
    def error(**privacy):
        config = digits.get_config()
        for name, value in privacy.items():
            setattr(config.privacy, name, value)
        own = AttackFlags(samples=64, steps=60, output=str(tmp_path / "a.png"))
        experiments.attack.main(resolve(config), own)
        lines = capsys.readouterr().out.splitlines()
        made, blind = (float(line.split("error ")[1].split(",")[0]) for line in lines[2:4])
        return made / blind

    assert error() < 0.3
    noised = error(noise=10.0, activation_clip=1.0, update_clip=1.0, reproducible=True)
    assert 0.7 < noised < 1.3


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"method": "fl"}, "sends no activations"),
        ({"device": 7}, "there are 2 devices"),
        ({"rounds": 3}, "give the noise itself"),
    ],
)
def test_what_cannot_be_attacked_is_said(tmp_path, change, words):
    config = digits.get_config()
    config.method = change.get("method", config.method)
    if "rounds" in change:
        config.run.rounds = change["rounds"]
        config.privacy.epsilon, config.privacy.delta = 8.0, 1e-5
        config.privacy.activation_clip = config.privacy.update_clip = 1.0
    own = AttackFlags(device=change.get("device", 0), output=str(tmp_path / "a.png"))
    with pytest.raises(ConfigError, match=words):
        experiments.attack.main(resolve(config), own)
    assert not (tmp_path / "a.png").exists()


def test_a_picture_that_cannot_be_written_is_told_before_the_attack(tmp_path):
    own = AttackFlags(device=7, output=str(tmp_path / "no" / "a.png"))  # there is no device 7
    with pytest.raises(ConfigError, match=r"--output=.*a\.png: the folder .* does not exist"):
        experiments.attack.main(resolve(digits.get_config()), own)


def test_a_picture_of_colours_has_a_row_for_each(tmp_path):
    rows = [np.zeros((2, 50, 48, 3)), np.ones((2, 50, 48, 3))]
    (tmp_path / "a.png").write_bytes(draw_picture(rows))
    with Image.open(tmp_path / "a.png") as picture:
        pixels = np.asarray(picture)
    assert pixels.shape == (2 * 56 + 6, 2 * 54 + 6, 3)
    np.testing.assert_array_equal(pixels[6:56, 6:54], 0)
    np.testing.assert_array_equal(pixels[62:], 255)
