"""Every registered message goes to the wire and back; each field refuses what it does not take."""

from __future__ import annotations

import json
import random
import re
from types import SimpleNamespace

import pytest

from pipar_jax.errors import PeerError, ProtocolError
from pipar_jax.protocol import messages, registry
from pipar_jax.protocol.registry import KINDS, ControlMessage, Form, Sender
from pipar_jax.protocol.values import Memory
from pipar_jax.protocol.wire_fields import Prose, struct
from tests.pipar_jax.roles import generate
from tests.sources import ROOT, modules

ALL = [KINDS[name] for name in sorted(KINDS)]
#: Messages with texts that nobody is shown as they are.
TEXTS = ("join_device", "join_node", "profiled", "nonfinite", "pull")


def arrived(body, kind="control", name=""):
    """What a link hands over."""
    return SimpleNamespace(kind=kind, body=body, name=name)


def decoded(kind, body):
    """What becomes of a message of a kind."""
    form, name = ("bundle", kind.name) if kind.form is Form.BUNDLE else ("control", "")
    sender = Sender.HOST if kind.sender is Sender.BOTH else kind.sender
    return registry.decode(arrived(body, form, name), sender, "device 3")


def texts(value, path=()):
    """Where in JSON there are texts, names of objects left out."""
    if isinstance(value, str):
        yield path
    elif isinstance(value, dict | list):
        for key, one in value.items() if isinstance(value, dict) else enumerate(value):
            yield from texts(one, (*path, key))


@pytest.mark.parametrize("kind", ALL, ids=[one.name for one in ALL])
def test_what_a_peer_says_to_a_person_is_one_printable_line(kind):
    """A terminal obeys some letters, and a log is read by lines."""
    body = generate.body(kind, random.Random(kind.name))
    for path in texts(body):
        if path == ("type",) or path[0] == "config":  # which is held to the schema, not shown
            continue
        odd = json.loads(json.dumps(body))
        *way, last = path
        place = odd
        for key in way:
            place = place[key]
        place[last] = "a\x1b[2J\r\n  b\0\u202e"
        try:
            said = decoded(kind, odd)
        except ProtocolError as error:
            assert str(error).isprintable(), path
        else:
            field = getattr(said, path[0])
            assert field == "a?[2J b??" or kind.name in TEXTS, path


def test_every_message_has_the_base_that_the_registry_sends():
    assert all(issubclass(kind.made, ControlMessage) for kind in ALL)


def test_every_message_is_exported():
    for kind in ALL:
        assert kind.made.__name__ in messages.__all__
        assert getattr(messages, kind.made.__name__) is kind.made


def test_long_prose_is_cut_where_it_is_written():
    spec = Prose()
    assert spec.read(spec.write("x\n" * 5000), "").count("x") == 2000


@pytest.mark.parametrize("kind", ALL, ids=[one.name for one in ALL])
def test_a_message_comes_back_from_the_wire_as_it_was(kind):
    rng = random.Random(kind.name)
    for _ in range(25):
        body = generate.body(kind, rng)
        first = decoded(kind, json.loads(json.dumps(body)))
        wire = json.dumps(registry.encode(first), allow_nan=False)
        again = decoded(kind, json.loads(wire))
        assert type(first) is kind.made
        assert registry.encode(again) == json.loads(wire)


@pytest.mark.parametrize("kind", ALL, ids=[one.name for one in ALL])
def test_each_field_of_a_message_refuses_what_it_does_not_take(kind):
    rng = random.Random(kind.name)
    specs = struct(kind.made).of
    for name, spec in specs.items():
        for bad in generate.wrong(spec):
            body = {**generate.body(kind, rng), name: bad}
            with pytest.raises(ProtocolError) as error:
                decoded(kind, body)
            line = str(error.value)
            assert line.startswith(f"device 3 sent {kind.name!r} with {name}"), line
            assert "expected" in line and "\n" not in line and len(line) < 1000, line
        body = generate.body(kind, rng)
        del body[name]
        with pytest.raises(ProtocolError, match=f"{name}=nothing: it is missing"):
            decoded(kind, body)
    with pytest.raises(ProtocolError, match="expected no such field"):
        decoded(kind, {**generate.body(kind, rng), "something": 1})


@pytest.mark.parametrize("kind", ALL, ids=[one.name for one in ALL])
def test_a_message_is_taken_only_from_whom_it_is_from_and_in_its_form(kind):
    body = generate.body(kind, random.Random(1))
    for sender in (Sender.HOST, Sender.COORDINATOR, Sender.NEIGHBOUR):
        neighbour = sender is Sender.NEIGHBOUR
        if kind.sender is sender or (kind.sender is Sender.BOTH and not neighbour):
            continue
        with pytest.raises(ProtocolError, match="do both hosts run the same version"):
            registry.decode(arrived(body), sender, "device 3")
    sender = Sender.HOST if kind.sender is Sender.BOTH else kind.sender
    if kind.form is not Form.EITHER:
        other = "control" if kind.form is Form.BUNDLE else "bundle"
        with pytest.raises(ProtocolError, match=f"as a {other} message"):
            registry.decode(arrived(body, other, kind.name), sender, "device 3")
    if kind.form is not Form.CONTROL:
        with pytest.raises(ProtocolError, match="as a bundle message 'another'"):
            registry.decode(arrived(body, "bundle", "another"), sender, "device 3")


@pytest.mark.parametrize("name", [None, 7, [], {}, "", "no such", "x" * 10_000, "\0\n"])
def test_a_message_of_no_known_type_is_refused_in_one_line(name):
    with pytest.raises(PeerError) as error:
        registry.decode(arrived({"type": name}), Sender.HOST, "device 3")
    line = str(error.value)
    assert line.startswith("device 3 sent a control message of type ") and "\n" not in line
    assert len(line) < 1000


def test_what_is_sent_is_within_what_is_taken():
    """What is measured or said may be beyond a limit; it is cut here, not refused there."""
    sums = {"rmse": (float("inf"), 1.0)}
    stored = messages.Stored(0, 0, 1e30, Memory(1, 2, 3), float("nan"), 1, sums)
    again = decoded(KINDS["stored"], json.loads(json.dumps(registry.encode(stored))))
    assert again.longest_s == 1e9 and again.loss != again.loss and again.metrics == sums
    said = decoded(KINDS["failed"], registry.encode(messages.Failed("x" * 100_000)))
    assert len(said.error) == 4000


def test_no_dictionary_with_a_type_is_made_outside_the_registry():
    """Control messages are dataclasses; a dictionary with "type" would be another way."""
    found = [
        f"{path}: {line}"
        for name, path in modules().items()
        if name.startswith("pipar_jax") and name != "pipar_jax.protocol.registry"
        for line in (ROOT / path).read_text().splitlines()
        if re.search(r"""["']type["']\s*[:\]]|\.get\(["']type["']""", line)
    ]
    assert not found
