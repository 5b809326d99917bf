"""The ledger is on disk before anything is sent, and survives whatever ends the process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest

from pipar_jax.config import Config
from pipar_jax.errors import RunError
from pipar_jax.privacy import policy
from pipar_jax.privacy.ledger import LEDGER, PrivacyLedger
from pipar_jax.privacy.spending import Entry, Spending
from tests.patience import PROCESS_S

WHAT = ("activations",)


def test_a_record_costs_the_dearest_step_of_each_epoch():
    spending = Spending()
    for step in range(5):
        spending.add(Entry("epoch 0", step, 1.0))
    assert spending.spent == 1.0
    spending.add(Entry("epoch 0", 3, 1.0))  # repeated
    assert spending.spent == 2.0
    entry = Entry("epoch 1", 0, 0.5)
    assert spending.spent_after(entry) == spending.after([entry]).spent == 2.5
    assert spending.spent == 2.0


def test_other_seeds_divide_the_records_otherwise():
    config = Config()
    config.data.batch_size = 10
    first, last, next_epoch = (policy.step_entry(config, 25, step, 1.0) for step in (0, 2, 3))
    assert first.group == last.group != next_epoch.group
    assert (first.step, last.step, next_epoch.step) == (0, 2, 0)
    config.seed = 1
    assert policy.step_entry(config, 25, 0, 1.0).group != first.group
    groups = {policy.step_entry(config, 25, 0, 1.0, data).group for data in ("", "a", "b", "a")}
    assert len(groups) == 3


def test_a_response_that_is_repeated_costs_once(tmp_path):
    for _ in range(2):
        ledger = PrivacyLedger(tmp_path)
        ledger.add_labels("a", 1.5)
        ledger.close()
    assert PrivacyLedger(tmp_path).spending.label_epsilon == 1.5


def test_a_ledger_is_continued_and_those_of_earlier_folders_count(tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    for folder, earlier in ((old, ()), (new, (old,)), (new, (old,))):
        ledger = PrivacyLedger(folder, earlier)
        ledger.add(Entry("e", 0, 1.0), WHAT)
        ledger.close()
    assert PrivacyLedger(new, (old,)).spending.spent == 3.0
    # The lines of the earlier folder are in the new one, once, so that the next run has them.
    assert PrivacyLedger(new).spending.spent == 3.0
    assert PrivacyLedger(tmp_path / "third", (new,)).spending.spent == 3.0
    ledger = PrivacyLedger(old)
    ledger.add(Entry("e", 0, 1.0), WHAT)  # it goes on as well
    ledger.add_labels("a", 1.5)
    ledger.close()
    assert PrivacyLedger(new, (old,)).spending.spent == 4.0
    assert PrivacyLedger(new, (old,)).spending.label_epsilon == 1.5


def test_a_copy_that_was_cut_short_is_completed(tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    for folder, earlier in ((old, ()), (new, (old,))):
        ledger = PrivacyLedger(folder, earlier)
        for _ in range(3):
            ledger.add(Entry("e", 0, 1.0), WHAT)
        ledger.close()
    lines = (new / LEDGER).read_bytes().splitlines(keepends=True)
    (new / LEDGER).write_bytes(lines[0] + lines[1][:9])
    ledger = PrivacyLedger(new, (old,))
    ledger.add(Entry("e", 0, 1.0), WHAT)
    ledger.close()
    assert PrivacyLedger(new).spending.spent == 4.0


def test_a_line_that_was_cut_short_is_of_nothing_that_was_sent(tmp_path):
    ledger = PrivacyLedger(tmp_path)
    ledger.add(Entry("e", 0, 1.0), WHAT)
    ledger.close()
    with open(tmp_path / LEDGER, "ab") as file:
        file.write(b'{"group": "e", "st')
    ledger = PrivacyLedger(tmp_path)
    assert ledger.spending.spent == 1.0
    ledger.add(Entry("e", 0, 1.0), WHAT)
    ledger.close()
    assert [json.loads(line)["step"] for line in (tmp_path / LEDGER).read_text().splitlines()] == [
        0,
        0,
    ]


@pytest.mark.parametrize("line", ['{"group": "e"}', "no JSON", "[]", '{"group":"e","step":0}'])
def test_a_damaged_ledger_is_refused(line, tmp_path):
    (tmp_path / LEDGER).write_text(f'{{"group": "e", "step": 0, "cost": 1}}\n{line}\n')
    with pytest.raises(RunError, match=r"line 2, is damaged"):
        PrivacyLedger(tmp_path)


KILLED = """
import os, signal, sys
from pathlib import Path
from pipar_jax.privacy.ledger import PrivacyLedger
from pipar_jax.privacy.spending import Entry
ledger = PrivacyLedger(Path(sys.argv[1]))
for step in range(1000):
    ledger.add(Entry("e", step % 2, 1.0), ("activations",))
    print(step, flush=True)  # as if it were sent
    if step == 6:
        os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_was_sent_before_a_kill_is_there(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", KILLED, tmp_path],
        capture_output=True, text=True, timeout=PROCESS_S,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL
    sent = len(done.stdout.splitlines())
    assert sent == 7 and PrivacyLedger(tmp_path).spending.spent == 4.0
