"""Every event that gives a reason is said in one plain line."""

from __future__ import annotations

import ast

import pytest

from pipar_jax.report.event_lines import LINES
from tests.sources import ROOT, modules

FIELDS = {
    "address": "127.0.0.1 port 5", "device": 1, "error": "it broke", "host": "d1",
    "optimizer": True, "personal": False, "plan": "device", "reason": "the disk is full",
    "round": 4, "rounds": 4, "step": 2, "untold": 3,
}  # fmt: skip


def _events_with_a_reason() -> dict[str, set[str]]:
    """Returns the fields of the events that the package tells with a reason, by name."""
    told: dict[str, set[str]] = {}
    for name, path in modules().items():
        if not name.startswith("pipar_jax."):
            continue
        for node in ast.walk(ast.parse((ROOT / path).read_text())):
            if not isinstance(node, ast.Dict):
                continue
            made = {key.value: value for key, value in zip(node.keys, node.values, strict=True)
                    if isinstance(key, ast.Constant)}  # fmt: skip
            event = made.get("event")
            if isinstance(event, ast.Constant) and "reason" in made:
                told[str(event.value)] = {str(key) for key in made}
    return told


def test_every_event_with_a_reason_has_a_line() -> None:
    told = _events_with_a_reason()
    assert {"checkpoint_failed", "refused", "state_lost"} <= told.keys()
    assert told.keys() <= LINES.keys()
    for name, fields in told.items():
        line = LINES[name]({key: FIELDS.get(key) for key in fields})
        assert FIELDS["reason"] in line and "\n" not in line


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("run_resumed", "goes on from the checkpoint after round 4"),
        ("checkpoint_failed", "continues without a checkpoint after round 4: the disk is full"),
        ("state_lost", "device 1 goes on with a fresh optimiser state: the disk is full"),
        ("stopped", "stops after round 5: the disk is full"),
        ("refused", "device 1 was refused: the disk is full (3 more were refused)"),
    ],
)
def test_a_line_counts_rounds_from_1_and_names_the_host(name: str, says: str) -> None:
    assert says in LINES[name](FIELDS)


@pytest.mark.parametrize("optimizer", [True, False])
def test_a_lost_state_with_personal_weights_says_so(optimizer: bool) -> None:
    line = LINES["state_lost"](FIELDS | {"personal": True, "optimizer": optimizer})
    fresh = "a fresh optimiser state and " if optimizer else ""
    assert f"goes on with {fresh}older personal weights: the disk is full" in line


def test_removed_checkpoints_are_named() -> None:
    line = LINES["checkpoints_removed"]({"rounds": [20, 30], "back_to": 10})
    assert "after rounds 20, 30 are removed" in line and "that after round 10" in line


def test_a_stranger_is_named_by_its_address() -> None:
    refused = FIELDS | {"host": None, "untold": 0}
    assert LINES["refused"](refused) == "127.0.0.1 port 5 was refused: the disk is full"
