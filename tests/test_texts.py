"""What the project's texts name is there: files, modules, commands, fields of the configuration."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import re
import typing
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from pipar_jax.config import Config
from tests.sources import PACKAGES, ROOT, files, modules

WORDS = "|".join((*PACKAGES, "tests"))
#: A file with its folder, or by its name alone.
FILE = re.compile(r"(?<![\w./<-])((?:[a-z_0-9]+/)*[a-z_0-9]+\.py)\b")
FOLDER = re.compile(rf"`((?:{WORDS})(?:/\w+)*)/?`")
NAME = re.compile(rf"(?<![\w./-])((?:{WORDS})(?!\.(?:NAME|md)\b)(?:\.[A-Za-z_]\w*)+)(?![\w*(/])")
COMMAND = re.compile(r"(?:`|\bbin/|^ +)pipar ([a-z_]+)\b|^pipar ([a-z_]+) -", re.M)
MODULE = re.compile(r"python -m ([a-z_.]+)")
FIELD = re.compile(r"--config\.([a-z_]+(?:\.\w+)*)")
#: Files of a reader's, in examples, and modules of other projects.
EXAMPLES = {"mine.py", "mytask.py", "mytraining.py", "corpus.py"}
FOREIGN = {"pip", "pytest", "venv", "json.tool", "http.server"}


@cache
def texts() -> dict[str, str]:
    """Return each Markdown file's text, and each source's strings and comments."""
    found = {}
    for path in files():
        if path.suffix == ".md":
            found[str(path)] = (ROOT / path).read_text(encoding="utf-8")
        elif path.suffix == ".py" and path.parts[0] in PACKAGES:
            found[str(path)] = "\n".join(_prose(path))
    return found


def _prose(path: Path) -> Iterator[str]:
    source = (ROOT / path).read_text(encoding="utf-8")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
    yield from re.findall(r"^\s*#.*", source, re.M)


def named(pattern: re.Pattern[str]) -> Iterator[tuple[str, str]]:
    """Yield what a pattern finds in the texts, and where."""
    for place, text in texts().items():
        for match in pattern.finditer(text):
            yield match[match.lastindex], place


@cache
def _attributes(module: str) -> frozenset[str]:
    tree = ast.parse((ROOT / modules()[module]).read_text(encoding="utf-8"))
    names = {getattr(node, "name", getattr(node, "id", None)) for node in ast.walk(tree)}
    for node in ast.walk(tree):
        if isinstance(node, ast.alias):
            names.add(node.asname or node.name)
    return frozenset(name for name in names if name)


def is_there(name: str) -> bool:
    """Return whether a dotted name is a module, a package, or something that a module has."""
    if Path(ROOT, *name.split(".")).is_dir():
        return True
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        module = ".".join(parts[:length])
        if module in modules():
            return length == len(parts) or parts[length] in _attributes(module)
    return False


def test_a_file_that_is_named_is_there() -> None:
    known = {str(path) for path in files()}
    ends = {"/".join(Path(path).parts[-n:]) for path in known for n in (1, 2, 3)} | known
    wrong = [
        (name, place)
        for name, place in named(FILE)
        if name not in ends and name not in EXAMPLES and "NAME" not in name
    ]
    wrong += [(name, place) for name, place in named(FOLDER) if not (ROOT / name).is_dir()]
    assert not wrong


def _anchors(text: str) -> set[str]:
    """Return the anchors of a page's headings, as they are made where it is shown."""
    heads = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}


def test_a_link_leads_to_a_page_and_a_heading_that_are_there() -> None:
    wrong = []
    for place, text in texts().items():
        if not place.endswith(".md"):
            continue
        for link in re.findall(r"\]\(([^)\s]+)\)", text):
            path, _, anchor = link.partition("#")
            target = (ROOT / place).parent / path if path else ROOT / place
            if "://" in link:
                continue
            if not target.exists() or (anchor and anchor not in _anchors(target.read_text())):
                wrong.append((link, place))
    assert not wrong


def test_a_module_that_is_named_is_there() -> None:
    assert not [(name, place) for name, place in named(NAME) if not is_there(name)]


def test_a_command_that_is_named_is_there() -> None:
    commands = {path.stem for path in (ROOT / "experiments").glob("*.py")}
    assert not [(name, place) for name, place in named(COMMAND) if name not in commands]
    wrong = []
    for name, place in named(MODULE):
        if (name.split(".")[0] in PACKAGES and not is_there(name.rstrip("."))) or (
            name.split(".")[0] not in PACKAGES and name not in FOREIGN
        ):
            wrong.append((name, place))
    assert not wrong


def test_a_field_that_is_named_is_there() -> None:
    assert not [(name, place) for name, place in named(FIELD) if not _is_field(Config, name)]


def _is_field(kind: typing.Any, name: str) -> bool:
    """Return whether a configuration has a field: ``devices.1.link`` is that of all devices."""
    for part in re.sub(r"\b\d+\b", "defaults", name).split("."):
        if not dataclasses.is_dataclass(kind) or part not in typing.get_type_hints(kind):
            return False
        kind = typing.get_type_hints(kind)[part]
    return True


@pytest.mark.parametrize("name", ["comms.codec", "pipar_jax.policy", "pipar_jax.config.Confug"])
def test_a_name_that_is_gone_would_be_found(name: str) -> None:
    assert not is_there(name)
    assert is_there("pipar_jax.config.Config")
    assert importlib.import_module("pipar_jax.config").Config is Config


SECTION = re.compile(r"^( *)(Args|Attributes|Raises|Returns|Yields):$")


def _docstrings(path: Path) -> Iterator[str]:
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node) or ""


def departures(docstring: str) -> list[str]:
    """Return the lines of a docstring that are not in the project's dialect of Google style."""
    found, indent = [], None
    for line in docstring.splitlines():
        if re.search(r"(?<!`)`[^`\s][^`]*`(?!`)", line):
            found.append(line)  # code has two backticks
        if (head := SECTION.match(line)) is not None:
            indent = len(head[1]) + 2
        elif indent is not None and line.strip():
            depth = len(line) - len(line.lstrip())
            if depth < indent:
                indent = None
            elif depth == indent + 1:
                found.append(line)  # items are indented by two, their next lines by four
            elif depth == indent and re.match(r"[\w*`.]+: [a-z]+[ ,.;]", line.strip()):
                found.append(line)  # a description begins with a capital letter
    return found


def test_docstrings_are_in_one_dialect() -> None:
    paths = [p for p in files() if p.suffix == ".py" and p.parts[0] in PACKAGES]
    wrong = [(str(p), line) for p in paths for text in _docstrings(p) for line in departures(text)]
    assert not wrong


@pytest.mark.parametrize("line", ["x: a number.", "x: See `y`.", " x: Three spaces."])
def test_another_dialect_would_be_found(line: str) -> None:
    assert departures(f"Adds.\n\nArgs:\n  {line}\n")
    assert not departures("Adds.\n\nArgs:\n  x: See ``y``,\n    and more.\n\nReturns:\n  It.\n")
