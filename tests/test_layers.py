"""The layers hold: experiments → configs → pipar_jax → {stages, comms}, and nothing points back."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from tests.patience import PROCESS_S
from tests.sources import PACKAGES, ROOT, imports, modules

# For each package, which of the five it may import besides itself.
BELOW = {
    "comms": set(),
    "stages": set(),
    "pipar_jax": {"comms", "stages"},
    "configs": {"pipar_jax", "comms", "stages"},
    "experiments": {"configs", "pipar_jax", "comms", "stages"},
}
# Third-party code that a package may use; the ones not named may use any that is declared.
THIRD_PARTY = {"comms": {"numpy", "ml_dtypes", "xxhash"}, "configs": set()}
# What a package must not touch, wherever in the file.
FORBIDDEN = {
    "comms": {"jax", "flax", "optax", "multiprocessing", "subprocess"},
    "stages": {"socket", "selectors", "threading", "multiprocessing", "subprocess", "asyncio"},
    "configs": {"jax", "flax", "optax", "numpy"},
}
# Never in any of the five: code that runs what a peer or a file sends.
UNSAFE = {"pickle", "marshal", "shelve", "dill", "cloudpickle"}
# The rooms of a package, bottom up: a room uses only those on the floors below its own.
FLOORS = {
    "comms": ("errors arrays", "options wire emulation", "codecs", "link"),
    "pipar_jax": (
        "errors version",
        "disk",
        "schedule codec_kernels",
        "config cost_model",
        "data training aggregation simulator protocol privacy",
        "methods",
        "runtime report tuner",
        "profiling",
        "roles",
        "launch",
    ),
    "experiments": ("latency_data benchmarks",),
}
# What loads no jax: the launcher needs these before XLA_FLAGS and processor affinity are set.
WITHOUT_JAX = (
    "pipar_jax",
    "pipar_jax.config",
    "pipar_jax.schedule.plan",
    "experiments.benchmarks.harness",
)


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_imports_only_what_lies_below_it(package: str) -> None:
    allowed = BELOW[package] | {package}
    wrong = [
        f"{modules()[name]}:{item.line} imports {item.module}"
        for name in modules()
        if name.split(".")[0] == package
        for item in imports(name)
        if (top := item.module.split(".")[0]) in PACKAGES and top not in allowed
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_uses_only_the_libraries_meant_for_it(package: str) -> None:
    forbidden = FORBIDDEN.get(package, set()) | UNSAFE
    wrong = []
    for name in modules():
        if name.split(".")[0] != package:
            continue
        for item in imports(name):
            top = item.module.split(".")[0]
            foreign = top not in sys.stdlib_module_names and top not in PACKAGES
            unmeant = foreign and package in THIRD_PARTY and top not in THIRD_PARTY[package]
            if top in forbidden or unmeant:
                wrong.append(f"{modules()[name]}:{item.line} imports {item.module}")
    assert not wrong, "\n".join(wrong)


def test_nobody_imports_a_binary() -> None:
    shared = tuple(f"experiments.{room}" for room in _rooms("experiments"))
    wrong = [
        f"{modules()[name]}:{item.line} imports {item.module}"
        for name in modules()
        for item in imports(name)
        if item.module.startswith("experiments.") and not item.module.startswith(shared)
    ]
    assert not wrong, "\n".join(wrong)


def _rooms(package: str) -> dict[str, int]:
    """Return each room of a package with the number of its floor."""
    return {room: i for i, floor in enumerate(FLOORS[package]) for room in floor.split()}


def _arrows(package: str) -> set[tuple[str, str, str, str]]:
    """Return (room, room it imports, module, module it imports) within a package."""
    found = set()
    for name in modules():
        if not name.startswith(f"{package}."):
            continue
        for item in imports(name):
            if item.module.startswith(f"{package}."):
                ends = name.split(".")[1], item.module.split(".")[1]
                if ends[0] != ends[1]:
                    found.add((*ends, name, item.module))
    return found


def _upward(arrows: set[tuple[str, str, str, str]], floors: dict[str, int]) -> list[str]:
    """Return the arrows that do not point to a lower floor."""
    return sorted(
        f"{above} imports {below}: {user} imports {used}"
        for above, below, user, used in arrows
        if floors[below] >= floors[above]
    )


@pytest.mark.parametrize("package", FLOORS)
def test_every_room_has_a_floor_and_imports_only_from_lower_ones(package: str) -> None:
    floors = _rooms(package)
    rooms = {name.split(".")[1] for name in modules() if name.startswith(f"{package}.")}
    if package == "experiments":  # the binaries are the roof
        rooms = {room for room in rooms if modules()[f"{package}.{room}"].name == "__init__.py"}
    assert rooms <= set(floors), f"{package}: no floor for {sorted(rooms - set(floors))}"
    arrows = {arrow for arrow in _arrows(package) if arrow[0] in floors and arrow[1] in floors}
    assert not (wrong := _upward(arrows, floors)), "\n".join(wrong)


@pytest.mark.parametrize("package", FLOORS)
def test_an_arrow_that_is_turned_would_be_found(package: str) -> None:
    floors = _rooms(package)
    arrows = {arrow for arrow in _arrows(package) if arrow[0] in floors and arrow[1] in floors}
    assert arrows or len(FLOORS[package]) == 1
    for above, below, user, used in arrows:
        assert _upward({(below, above, used, user)}, floors)


def test_the_map_shows_the_floors() -> None:
    text = (ROOT / "WORKSPACE.md").read_text(encoding="utf-8")
    table = text.partition("| layer of `pipar_jax/`")[2].partition("\n\n")[0]
    rows = re.findall(r"^\| (\d+) \| (`.*) \|$", table, re.M)
    shown = {int(number): set(re.findall(r"`(\w+)`", rooms)) for number, rooms in rows}
    there = {name.split(".")[1] for name in modules() if name.startswith("pipar_jax.")}
    floors = [set(floor.split()) & there for floor in FLOORS["pipar_jax"]]
    assert [shown.get(i) for i in range(1, len(floors) + 1)] == floors


def test_no_packages_import_each_other_in_a_circle() -> None:
    def package(name: str) -> str:
        """Return a module's package; one that lies loose in a top-level package is a room alone."""
        is_package = modules()[name].name == "__init__.py"
        return name if is_package or name.count(".") == 1 else name.rpartition(".")[0]

    edges: dict[str, set[str]] = {}
    for name in modules():
        if modules()[name].name == "__init__.py":
            continue  # a package's face names what is behind it
        own = edges.setdefault(package(name), set())
        own |= {package(item.module) for item in imports(name) if item.module in modules()}
    for name in set().union(*edges.values()):
        edges.setdefault(name, set())
    assert not (circle := _circle(edges)), " imports ".join(circle)


def test_no_modules_import_each_other_in_a_circle() -> None:
    edges = {
        name: {item.module for item in imports(name) if item.eager and item.module in modules()}
        for name in modules()
    }
    assert not (circle := _circle(edges)), " imports ".join(circle)


def _circle(edges: dict[str, set[str]]) -> list[str]:
    """Return the modules of one circle of imports, its first again at the end, or nothing."""
    done: set[str] = set()

    def follow(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return []
        for below in sorted(edges[name] - {name}):
            if circle := follow(below, [*path, name]):
                return circle
        done.add(name)
        return []

    return next((circle for name in sorted(edges) if (circle := follow(name, []))), [])


def test_a_circle_would_be_found() -> None:
    assert _circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert _circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_what_the_launcher_needs_loads_no_jax() -> None:
    presets = [name for name in modules() if name.split(".")[0] == "configs"]
    assert presets, "no presets found in configs/"
    heavy = ("jax", "jaxlib", "flax", "optax", "tensorflow", "torch", "sklearn")
    code = (
        f"import importlib, sys\n"
        f"for name in {[*WITHOUT_JAX, *presets]!r}:\n"
        f"    importlib.import_module(name)\n"
        f"    loaded = [heavy for heavy in {heavy!r} if heavy in sys.modules]\n"
        f"    assert not loaded, f'importing {{name}} loads {{loaded}}'\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=PROCESS_S
    )
    assert result.returncode == 0, result.stderr
