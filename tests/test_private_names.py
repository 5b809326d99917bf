"""Tests use the product's public names; what they reach by private ones is listed with reasons."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from tests.sources import ROOT, files

#: Names with an underscore that are public: those of named tuples, and an exit without clean-up.
PUBLIC = {"_replace", "_fields", "_asdict", "_make", "_exit"}
#: Functions that take a name as a text.
BY_NAME = {"setattr", "getattr", "delattr", "hasattr"}

#: What is reached in tests by private names, and why there is no public way.
ALLOWED: dict[str, tuple[set[str], str]] = {
    "tests/comms/link/test_doorstep.py": (
        {"_exchange", "_connect_ended", "_shake_hands"},
        "faults of the operating system, and bugs of our own, put into a handshake",
    ),
    "tests/comms/test_admission.py": (
        {"_begin_message"},
        "a call where memory would be taken is made an error",
    ),
    "tests/comms/test_security.py": (
        {"_check_proof"},
        "a false listener that leaves its own check out",
    ),
    "tests/comms/wire/test_frame_reader.py": (
        {"_lanes"},
        "the state of a message that a cut has ended",
    ),
    "tests/stages/test_compile_cache.py": (
        {"_src"},
        "jax has no public name for its cache of compiled programs",
    ),
    "tests/pipar_jax/roles/conftest.py": (
        {"_dial"},
        "workers without sockets",
    ),
    "tests/pipar_jax/roles/test_adaptation.py": (
        {"_ask", "_choice", "_compiled", "_consider", "_numbers"},
        "a failure of the adapting thread, and an order of two threads that no timing brings about",
    ),
    "tests/pipar_jax/roles/test_lies.py": (
        {"_Look", "_consider", "_learn", "_watch"},
        "what the adapting thread makes of an answer, hundreds of times without its clock",
    ),
    "tests/pipar_jax/roles/test_membership.py": (
        {"_names", "_reason", "_waiting"},
        "links that end between two statements of another thread",
    ),
    "tests/pipar_jax/roles/open_runs.py": (
        {"_seed"},
        "something happens before the loader of one device alone",
    ),
    "tests/pipar_jax/roles/test_peer_links.py": (
        {"_early"},
        "an order of arrival: one connection is there before another one is asked for",
    ),
}  # fmt: skip


def _is_private(name: str) -> bool:
    return re.fullmatch(r"_[a-zA-Z]\w*", name) is not None and name not in PUBLIC


def _texts(call: ast.Call) -> Iterator[str]:
    """Yields the parts of names that a call is given as texts."""
    function = call.func
    called = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    for argument in call.args if called in BY_NAME else ():
        if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
            yield from argument.value.split(".")


def private(source: str) -> set[str]:
    """Returns the private names that a source takes from others than ``self`` and ``cls``."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute):
            own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            found |= set() if own else {node.attr}
        elif isinstance(node, ast.ImportFrom):
            found |= {*(node.module or "").split("."), *(alias.name for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {part for alias in node.names for part in alias.name.split(".")}
        elif isinstance(node, ast.Call):
            found.update(_texts(node))
    return {name for name in found if _is_private(name)}


def test_tests_use_public_names_except_for_what_is_listed() -> None:
    used = {
        path.as_posix(): names
        for path in files()
        if path.suffix == ".py" and path.parts[0] == "tests"
        if (names := private((ROOT / path).read_text(encoding="utf-8")))
    }
    listed = {path: names for path, (names, _) in ALLOWED.items()}
    new = {path: names - listed.get(path, set()) for path, names in used.items()}
    over = {path: names - used.get(path, set()) for path, names in listed.items()}
    assert not any(new.values()), f"use a public way: { ({p: n for p, n in new.items() if n}) }"
    assert not any(over.values()), f"not used any more: { ({p: n for p, n in over.items() if n}) }"


def test_private_names_are_found_however_they_are_written() -> None:
    for source, names in {
        "made._a": {"_a"},
        "self._own, cls._own": set(),
        "self.made._b": {"_b"},
        "import a._c": {"_c"},
        "from a._d import b, _e": {"_d", "_e"},
        "patch.setattr(a, '_f', 1)": {"_f"},
        "patch.setattr('a.b._g', 1)": {"_g"},
        "name.endswith('_test'); row._replace(a=1); a.__name__; os._exit(7)": set(),
    }.items():
        assert private(source) == names, source
