"""Trials of what codecs cost in accuracy: valid settings, whose pairs differ in codecs alone."""

from __future__ import annotations

import dataclasses
import itertools

from experiments.benchmarks.codec_accuracy import CASES, DATA, SEEDS, Setting
from pipar_jax.config.codec_candidates import SAFE_BITS, bit_widths, configured
from pipar_jax.config.tuner_fields import TunerConfig
from pipar_jax.methods.resolution import resolve
from pipar_jax.schedule.plan import Codecs


def test_settings_are_valid_and_differ_from_raw_in_their_codecs(tmp_path):
    names = set()
    for data, case, seed in itertools.product(DATA, CASES, SEEDS):
        setting = Setting(data, case, seed, str(tmp_path))
        config = resolve(setting.config(tmp_path))
        names.add(setting.name)
        assert configured(config.pipeline) == Codecs(*CASES[case])
        raw = dataclasses.replace(setting, case="raw").config(tmp_path)
        raw.name, raw.pipeline = config.name, config.pipeline
        assert resolve(raw) == config
    assert len(names) == len(DATA) * len(CASES) * len(SEEDS)


def test_the_trials_have_the_fewest_bits_that_are_chosen_by_default():
    fewest = bit_widths(TunerConfig(), "activation")[0]
    assert CASES[fewest] == (fewest, fewest) and SAFE_BITS == 8
