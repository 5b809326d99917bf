"""What is packaged, declared and written down about the project agrees with what is there."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

from tests.patience import PROCESS_S
from tests.sources import PACKAGES, ROOT, files, imports, modules

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
# Names under which some distributions are imported; the others are imported under their own.
IMPORTED_AS = {
    "absl-py": "absl",
    "grpcio": "grpc",
    "pillow": "PIL",
    "orbax-checkpoint": "orbax",
    "scikit-learn": "sklearn",
    "tensorboardx": "tensorboardX",
}
LOCK_FILES = ("requirements.txt", "requirements-dev.txt")


def _imported_as(requirement: str) -> str:
    name = re.match(r"[A-Za-z0-9._-]+", requirement).group()
    return IMPORTED_AS.get(name, name.replace("-", "_"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project's wheel, built from what git has."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for path in files():
        (source / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, source / path)
    options = ("--no-build-isolation", "--no-deps", "--no-index", "--disable-pip-version-check")
    result = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", folder, source],
        capture_output=True,
        text=True,
        timeout=PROCESS_S,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    (made,) = folder.glob("*.whl")
    return made


def test_the_wheel_holds_the_five_packages_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert tops == set(PACKAGES)
    assert {f"{package}/py.typed" for package in PACKAGES} <= set(names)
    # Every module is in it but measurement code: pyproject's list of packages is complete.
    measuring = ("experiments/benchmarks/", "experiments/latency_data/")
    assert not [name for name in names if name.startswith(measuring)]
    product = {str(path) for path in modules().values() if not str(path).startswith(measuring)}
    assert product <= set(names)


SINK = '''
"""A module of the user's, beside packages of theirs that are called as ours are."""
import pathlib

class Lines:
    def __init__(self):
        self.file = open("events.txt", "a")
    def write(self, event):
        self.file.write(event["event"] + "\\n")
    def close(self):
        self.file.close()

def make(folder):
    return Lines()
'''
PRESET = """
from pipar_jax.config import Config

def get_config():
    config = Config(name="mine")
    config.model.name = "mlp"
    config.data.train_samples = 64
    return config
"""


def test_an_installed_pipar_trains_among_packages_of_the_same_names(
    wheel: Path, tmp_path: Path
) -> None:
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=False, symlinks=True)
    binaries = environment / "bin"
    # The libraries are those of these tests; the project itself comes from the wheel alone.
    (site,) = environment.glob("lib/python*/site-packages")
    (site / "libraries.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    options = ("--no-deps", "--no-index", "--disable-pip-version-check", "--quiet")
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", binaries / "python", "install", *options, wheel],
        check=True,
        capture_output=True,
        timeout=PROCESS_S,
    )
    folder = tmp_path / "project"
    for name in PACKAGES:
        (folder / name).mkdir(parents=True)
        text = f"raise SystemExit('the {name} of the user was imported')\n"
        (folder / name / "__init__.py").write_text(text)
    (folder / "sink.py").write_text(SINK)
    (folder / "mine.py").write_text(PRESET)
    own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def pipar(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [binaries / "pipar", *arguments],
            cwd=folder,
            env=own,
            capture_output=True,
            text=True,
            timeout=PROCESS_S,
        )

    small = ("--config.model.name=mlp", "--config.data.train_samples=64", "--config.epochs=1")
    done = pipar("train", "--config=digits", *small, "--config.run.sinks=sink:make")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "test accuracy" in done.stdout and "run in runs/digits" in done.stdout
    assert "run_finished" in (folder / "events.txt").read_text()
    assert (folder / "runs" / "digits" / "weights.safetensors").is_file()
    shown = pipar("describe", "--config=./mine.py")
    assert shown.returncode == 0 and "fc4" in shown.stdout, shown.stdout + shown.stderr
    assert pipar("--version").stdout == f"pipar {PROJECT['project']['version']}\n"


def test_every_listed_package_exists() -> None:
    listed = PROJECT["tool"]["setuptools"]["packages"]
    missing = [name for name in listed if not (ROOT / name.replace(".", "/")).is_dir()]
    assert not missing, f"pyproject.toml lists packages that are not there: {missing}"


def test_every_library_that_is_imported_is_declared() -> None:
    base = {_imported_as(item) for item in PROJECT["project"]["dependencies"]}
    extras = {
        _imported_as(item)
        for group in PROJECT["project"]["optional-dependencies"].values()
        for item in group
    }
    wrong = []
    for name, path in modules().items():
        for item in imports(name):
            top = item.module.split(".")[0]
            own = top in PACKAGES or top in sys.stdlib_module_names
            # An extra may be missing, so nothing may need one merely to be imported.
            if not own and top not in (base if item.eager else base | extras | {"jaxlib"}):
                wrong.append(f"{path}:{item.line} imports {top}")
    assert not wrong, "\n".join(wrong)


def test_the_version_is_the_same_everywhere() -> None:
    import pipar_jax

    version = PROJECT["project"]["version"]
    assert pipar_jax.__version__ == version
    assert re.search(rf"^## \[(Unreleased|{re.escape(version)})\]", _text("CHANGELOG.md"), re.M)


@pytest.mark.parametrize("lock", LOCK_FILES)
def test_a_lock_file_has_hashes_and_names_no_host(lock: str) -> None:
    text = _text(lock)
    entries = [entry for entry in re.split(r"\n(?=\S)", text) if not entry.startswith("#")]
    assert len(entries) > 40
    assert all(re.match(r"[\w.-]+==\S+", entry) for entry in entries)
    assert all("--hash=sha256:" in entry for entry in entries)
    assert not re.search(r"://|index-url|find-links|trusted-host| @ ", text)


def test_the_base_install_stays_light() -> None:
    names = set(re.findall(r"^([\w.-]+)==", _text("requirements.txt"), re.M))
    assert not names & {"tensorflow", "torch", "pytest", "mypy", "ruff"}


def test_the_lock_files_agree_and_cover_what_is_declared() -> None:
    base, dev = (set(re.findall(r"^([\w.-]+==\S+)", _text(lock), re.M)) for lock in LOCK_FILES)
    assert base <= dev
    locked = {entry.split("==")[0] for entry in dev}
    optional = PROJECT["project"]["optional-dependencies"]
    for requirement in [*PROJECT["project"]["dependencies"], *optional["dev"]]:
        assert re.match(r"[A-Za-z0-9._-]+", requirement).group() in locked, requirement


def test_no_file_names_an_index_host_or_a_place_on_this_machine() -> None:
    # Written in pieces, or this file would find itself.
    hosts = {"pypi" + ".org", "pythonhosted" + ".org", "pypi-" + "mirror"}
    settings = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"],
        capture_output=True,
        text=True,
        timeout=PROCESS_S,
    ).stdout
    hosts |= set(re.findall(r"https?://(?:[^/\s@']*@)?([^/\s:']+)", settings)) - {"localhost"}
    shared = {"/", "/home", "/opt", "/srv", "/tmp", "/usr", "/var"}
    places = {str(ROOT), str(ROOT.parent), str(Path.home())} - shared
    wanted = re.compile("|".join(re.escape(word) + r"\b" for word in sorted(hosts | places)))
    wrong = []
    for path in files():
        try:
            lines = (ROOT / path).read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            continue
        wrong += [
            f"{path}:{number}: {found.group()}"
            for number, line in enumerate(lines, start=1)
            if (found := wanted.search(line))
        ]
    assert not wrong, "\n".join(wrong)


def test_the_map_has_a_line_for_every_package() -> None:
    named = set(re.findall(r"^- `([\w/]+/)`: \S", _text("WORKSPACE.md"), re.M))
    there = {f"{path.parent}/" for path in modules().values()}
    assert not there - named, f"WORKSPACE.md says nothing of {sorted(there - named)}"


def test_the_map_names_nothing_that_is_not_there() -> None:
    text = re.sub(r"^```.*?^```", "", _text("WORKSPACE.md"), flags=re.M | re.S)
    named = re.findall(r"`([\w./-]+(?:/|\.(?:py|md|csv|txt|toml|npz)))`", text)
    named += re.findall(r"\]\(([\w./-]+)\)", text)
    assert len(named) > 100
    homes = (ROOT, ROOT / "pipar_jax")
    gone = {name for name in named if not any((home / name).exists() for home in homes)}
    # Names in capitals stand for any.
    gone = {name for name in gone if not re.search(r"[A-Z]{4}", name)}
    assert not gone, f"WORKSPACE.md names what is not there: {sorted(gone)}"


def test_the_map_stays_a_map() -> None:
    assert len(_text("WORKSPACE.md").splitlines()) <= 300


def test_the_map_gives_a_reason_for_every_dependency() -> None:
    text = _text("WORKSPACE.md")
    optional = PROJECT["project"]["optional-dependencies"].values()
    for requirement in {
        *PROJECT["project"]["dependencies"],
        *(r for group in optional for r in group),
    }:
        name = re.match(r"[A-Za-z0-9._-]+", requirement).group()
        assert re.search(rf"^- `{re.escape(name)}`.*: \S", text, re.M), (
            f"no reason given for {name}"
        )


def test_contributing_is_under_a_page() -> None:
    assert len(_text("CONTRIBUTING.md").splitlines()) <= 60


def test_setuptools_is_new_enough_to_build_the_wheel() -> None:
    (wanted,) = re.findall(r"setuptools>=(\d+)", " ".join(PROJECT["build-system"]["requires"]))
    assert int(metadata.version("setuptools").split(".")[0]) >= int(wanted)


def _text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_types_are_checked_without_the_extras_that_development_does_not_install() -> None:
    optional = PROJECT["project"]["optional-dependencies"]
    modules = {"grpcio": "grpc"}
    untyped = set(PROJECT["tool"]["mypy"]["overrides"][0]["module"])
    for requirement in optional["peers"]:
        name = re.match(r"[A-Za-z0-9._-]+", requirement).group()
        assert f"{modules.get(name, name)}.*" in untyped, requirement
