"""Whatever writes a file: it is there whole or not at all, and one line says why not."""

from __future__ import annotations

import ast
import errno
import functools
import io
import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

import pipar_jax
from experiments.benchmarks import harness, simulator_settings
from experiments.latency_data import timings
from experiments.latency_data.published_tables import read_timings
from pipar_jax.config import Config
from pipar_jax.config.checkpoints import WEIGHTS
from pipar_jax.cost_model.profile import HostProfile, UnitFacts
from pipar_jax.disk import files
from pipar_jax.errors import ConfigError, DiskError, PiparError
from pipar_jax.launch.run_folders import hold_folder
from pipar_jax.methods.resolution import resolve
from pipar_jax.profiling import kept_times
from pipar_jax.profiling.kept_times import Measured
from pipar_jax.profiling.predictor import latency_model
from pipar_jax.report import write_report
from pipar_jax.report.run import read_run
from pipar_jax.roles.run_folder import RunFolder
from pipar_jax.schedule.actions import Action
from pipar_jax.schedule.trace import Timed, Trace, read_rounds
from pipar_jax.training import checkpoint
from tests.disks import file_limit, full_disk, leftovers, read_only_disk
from tests.pipar_jax.report.test_page import PIPAR, write_run
from tests.sources import ROOT, modules

#: More than a page of the tiny disk, and nothing that can be packed.
NOISE = np.random.default_rng(0).integers(0, 256, 200_000, np.uint8)
TEXT = NOISE.tobytes().hex()
MEASURED = Measured(
    HostProfile((1,), ((0.0,),), ((0.0,),), (0.0,), 0.0, 0.0),
    (UnitFacts(TEXT, 0, 0, 0, 0, 0),),
    0.0,
)


def run_folder(path: Path) -> RunFolder:
    """Returns the writer of a run's folder, whose metrics are elsewhere: they grow, row by row."""
    made = RunFolder.__new__(RunFolder)
    made.path = path.parent
    return made


def save_config(path: Path) -> None:
    config = Config()
    config.model.name = TEXT
    run_folder(path).save_config(config)


def save_trace(path: Path) -> None:
    trace = Trace()
    rng = np.random.default_rng(0)
    rows = [
        Timed(Action(0, "F", 0, step, 0), *map(float, rng.random(2)), 1, 1) for step in range(5000)
    ]
    trace.add("d0", rows)
    trace.save(path)


def save_benchmark(path: Path) -> None:
    run = harness.Bench("title", json_path=path, console=Console(file=io.StringIO()))
    run.row(TEXT, 1.0, "s")
    run.finish()


@functools.cache
def shipped() -> tuple[latency_model.Weights, timings.Timings]:
    """Returns what the package has of the predictor."""
    return latency_model.load(), read_timings()


#: Every kind of file that a run or a binary leaves: its name, and what writes it.
WRITERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "text": ("a.txt", lambda path: files.write_text(path, TEXT)),
    "configuration": ("config.json", save_config),
    "plan": ("plan.json", lambda path: run_folder(path).save_plan({"plan": TEXT})),
    "trace": ("trace.json.gz", save_trace),
    "weights": (
        WEIGHTS,
        lambda path: run_folder(path).save_weights({"u": {"p": NOISE}}, {"u": {}}, {"a": 1}),
    ),
    "report": ("report.html", lambda path: write_report([RUNS[0]], path)),
    "benchmark": ("rows.json", save_benchmark),
    "profile that is kept": ("p.json", lambda path: kept_times.write_times(path, MEASURED)),
    "trial that is kept": ("t.json", lambda path: harness.kept(path.parent, "t", lambda: TEXT)),
    "images": ("data-600.npz", lambda path: simulator_settings.write_data(path.parent, 600)),
    "network of the predictor": ("n.safetensors", lambda path: shipped()[0].save(path)),
    "times of layers": ("t.npz", lambda path: shipped()[1].save(path)),
}  # fmt: skip
every_writer = pytest.mark.parametrize("writer", WRITERS)

#: Files that are not written as a whole by their nature, and why.
OTHERWISE = {
    "pipar_jax/disk/files.py": "the one way",
    "pipar_jax/disk/event_log.py": "grows row by row",
    "pipar_jax/schedule/trace.py": "grows round by round",
    "pipar_jax/launch/launcher.py": "the log that a child's output goes to",
    "pipar_jax/launch/streams.py": "standard streams that were closed",
    "pipar_jax/data/download.py": "written aside while its checksum is made, then renamed",
    "pipar_jax/roles/checkpoint_store.py": "Orbax writes a whole folder aside, then renames it",
    "pipar_jax/data/cache.py": "a whole folder is written aside",
    "pipar_jax/disk/locks.py": "a lock has nothing in it but the number of a process",
    "stages/compile_cache.py": "written aside and renamed, but not forced to the disk",
    "experiments/attack.py": "a picture is encoded in memory",
    "experiments/bench_rounds.py": "the log that a child's output goes to",
    "experiments/benchmarks/population_trials.py": "the log that a child's output goes to",
    "experiments/benchmarks/layer_formulations.py": "a table of the sources, for their authors",
}


RUNS: list[Path] = []


@pytest.fixture(scope="module", autouse=True)
def there(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Makes what the writers read, as long as files may grow."""
    RUNS[:] = [write_run(tmp_path_factory.mktemp("runs") / "a-run", "pipar", PIPAR)]
    shipped()


@every_writer
def test_a_file_is_complete_or_what_was_there_before(writer: str, tmp_path: Path) -> None:
    name, write = WRITERS[writer]
    folder = tmp_path
    path = folder / name
    with file_limit(4096), pytest.raises(DiskError) as caught:
        write(path)
    assert leftovers(folder) == []
    assert str(path) in str(caught.value) and "ulimit -f" in str(caught.value)
    write(path)
    assert leftovers(folder) == [name]
    whole = path.read_bytes()
    if writer != "trial that is kept":  # it does not measure again what it has
        with file_limit(4096), pytest.raises(DiskError):
            write(path)
        assert leftovers(folder) == [name] and path.read_bytes() == whole


@every_writer
def test_a_full_disk_is_one_line_with_file_and_remedy(writer: str, tmp_path: Path) -> None:
    name, write = WRITERS[writer]
    with full_disk(tmp_path, kilobytes=4) as disk:
        with pytest.raises(DiskError) as caught:
            write(disk / name)
        assert leftovers(disk) == []
    line = str(caught.value)
    assert "no space left on the disk while writing" in line and str(disk / name) in line
    assert "free some, or " in line and "--" in line and "\n" not in line


# A benchmark looks at its file before it measures: below.
@pytest.mark.parametrize("writer", [writer for writer in WRITERS if writer != "benchmark"])
def test_a_disk_that_cannot_be_written_is_one_line(writer: str, tmp_path: Path) -> None:
    name, write = WRITERS[writer]
    with read_only_disk(tmp_path) as disk, pytest.raises(DiskError) as caught:
        write(disk / name)
    line = str(caught.value)
    assert "Read-only file system" in line and str(disk / name) in line
    assert "give this user write permission, or " in line and "\n" not in line


def test_a_target_that_cannot_be_written_is_told_before_the_work(tmp_path: Path) -> None:
    (file := tmp_path / "file").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere" / "a")
    for path, says in (
        (tmp_path, "is a folder: name a file"),
        (tmp_path / "no" / "a.png", f"the folder {tmp_path / 'no'} does not exist; create it"),
        (tmp_path / "link", f"the folder {tmp_path / 'nowhere'} does not exist; create it"),
        (file / "a.png", "cannot be used: Not a directory; name another"),
        (tmp_path / ("a" * 300), "cannot be used: File name too long; name another"),
    ):
        with pytest.raises(ConfigError, match=f"^--output=x:? {re.escape(says)}"):
            files.check_target(path, "--output=x")
    for path in (file, tmp_path / "a.png", os.devnull):
        files.check_target(path, "--output=x")
    assert file.read_text() == "old" and leftovers(tmp_path) == ["file", "link"]


def test_a_folder_that_cannot_be_made_is_told_before_the_work(tmp_path: Path) -> None:
    (file := tmp_path / "file").write_text("")
    for path, says in ((file, "is a file: name a folder"), (file / "runs", "Not a directory")):
        with pytest.raises(ConfigError, match=f"^run.dir=x .*{says}"):
            files.check_folder(path, "run.dir=x")
    for path in (tmp_path, tmp_path / "a" / "b"):
        files.check_folder(path, "run.dir=x")
    assert leftovers(tmp_path) == ["file"]


def test_what_may_not_be_written_is_told_before_the_work(tmp_path: Path) -> None:
    with read_only_disk(tmp_path) as disk:
        for check, path in (
            (files.check_target, disk / "a.png"),
            (files.check_folder, disk),
            (files.check_folder, disk / "a" / "b"),
        ):
            says = rf"^x: this user may not write (in )?{disk}; give it write permission, or name"
            with pytest.raises(ConfigError, match=says):
                check(path, "x")


def test_names_that_are_taken_have_numbers(tmp_path: Path) -> None:
    found = []
    for _ in range(3):
        found.append(files.unused(tmp_path, "net-1.5", ".html"))
        found[-1].touch()
    assert [path.name for path in found] == ["net-1.5.html", "net-1.5-2.html", "net-1.5-3.html"]


def test_a_runs_folder_on_a_full_disk_and_on_one_that_cannot_be_written(tmp_path: Path) -> None:
    config = resolve(Config())
    with full_disk(tmp_path, kilobytes=4) as disk:
        (disk / "x").write_bytes(b"x" * 4096)
        config.run.dir = str(disk / "runs")
        says = "the run's folder cannot be created: no space left"
        with pytest.raises(DiskError, match=says), hold_folder(config):
            pass
    (tmp_path / "other").mkdir()
    with read_only_disk(tmp_path / "other") as disk:
        config.run.dir = str(disk / "runs")
        says = r"Read-only file system.*--config.run.dir"
        with pytest.raises(DiskError, match=says), hold_folder(config):
            pass


def test_every_file_is_written_by_the_one_way() -> None:
    """Over the sources: no other module opens a file for writing."""
    found = {
        f"{path}:{line}: {name}"
        for path in modules().values()
        if str(path) not in OTHERWISE
        for line, name in writes(ROOT / path)
    }
    assert not found, "\n".join(sorted(found))
    for path in OTHERWISE:
        assert (ROOT / path).is_file(), f"{path} is gone: take it out of OTHERWISE"


#: Calls that write files, by their last name.
_WRITES = {"write_text", "write_bytes", "save_file", "savez", "savez_compressed", "save", "dump",
           "NamedTemporaryFile", "touch"}  # fmt: skip
#: What may be called by such a name: the one way, and methods that end in it.
_OURS = {"files", "checkpoint", "trace", "weights", "made", "_files", "_store", "personal"}


def writes(path: Path) -> list[tuple[int, str]]:
    """Returns the calls of a module that write a file, other than inside ``replacing``."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.With) and any(_called(i.context_expr) == "replacing"
                                              for i in node.items):  # fmt: skip
            for inner in ast.walk(node):
                inner.replaced = True  # type: ignore[attr-defined]
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or getattr(node, "replaced", False):
            continue
        name = _called(node)
        if name in ("open", "fdopen"):
            modes = [*node.args, *(k.value for k in node.keywords if k.arg == "mode")]
            texts = [m.value for m in modes if isinstance(m, ast.Constant)]
            if any(isinstance(t, str) and len(t) < 4 and set(t) & set("wax+") for t in texts):
                found.append((node.lineno, name))
        elif name in _WRITES:
            owner = node.func.value if isinstance(node.func, ast.Attribute) else None
            whose = owner.attr if isinstance(owner, ast.Attribute) else getattr(owner, "id", None)
            own = whose in _OURS
            if not own and not (owner is None and name == "write_text"):
                found.append((node.lineno, name))
    return found


def _called(node: ast.AST) -> str:
    """Returns the last name of what is called."""
    if not isinstance(node, ast.Call):
        return ""
    if isinstance(node.func, ast.Attribute):
        return node.func.attr
    return node.func.id if isinstance(node.func, ast.Name) else ""


def test_the_search_for_writers_finds_them(tmp_path: Path) -> None:
    source = tmp_path / "source.py"
    source.write_text(
        "path.write_text('x')\nopen(path, 'w')\npath.open(mode='ab')\nnp.savez(path, a=1)\n"
        "open(path)\nopen(path, 'rb')\nfiles.write_text(path, 'x')\n"
        "with replacing(path) as aside:\n    np.savez(aside)\n"
    )
    assert [line for line, _ in writes(source)] == [1, 2, 3, 4]


def test_a_secret_is_readable_by_its_user_alone_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        files.write_secret(tmp_path / "secret", b"x")
        files.write_bytes(tmp_path / "open", b"x")
    finally:
        os.umask(before)
    assert (tmp_path / "secret").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "open").stat().st_mode & 0o044, "the comparison shows nothing"


def test_what_is_no_file_is_written_as_it_is(tmp_path: Path) -> None:
    files.write_text(os.devnull, "x")
    assert not Path(os.devnull).is_file()
    (tmp_path / "file").write_text("old")
    (tmp_path / "link").symlink_to("file")
    files.write_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_text() == "new"
    ends = os.pipe()
    try:
        if os.path.exists(path := f"/dev/fd/{ends[1]}"):  # not everywhere
            files.check_target(path, "x")
            files.write_text(path, "through a pipe")
            assert os.read(ends[0], 100) == b"through a pipe"
    finally:
        for end in ends:
            os.close(end)


def test_a_failure_of_the_writer_itself_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), files.replacing(tmp_path / "file") as aside:
        aside.write_text("half")
        raise ZeroDivisionError
    assert leftovers(tmp_path) == []


def test_an_error_that_somebody_wrote_keeps_its_text() -> None:
    assert files.describe_os_error(FileNotFoundError("put the CSV\n into …")) == (
        "put the CSV into …")  # fmt: skip
    quota = files.describe_os_error(OSError(errno.EDQUOT, "Quota", "/r/w"), "do this")
    assert quota == "no space left on the disk while writing /r/w: free some, or do this"
    assert json.dumps(quota)


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (FileNotFoundError(errno.ENOENT, "x", "a/b.json"), "No such file or directory: a/b.json"),
        (FileNotFoundError("put the CSV into data/"), "put the CSV into data/"),
        (KeyError("conv1"), "it has no 'conv1'"),
        (ValueError("two\nlines"), "two lines"),
        (ValueError(), "ValueError"),
    ],
)
def test_why_a_file_cannot_be_read_is_one_line_without_numbers(error: Exception, says: str) -> None:
    if isinstance(error, OSError) and error.errno:
        error.strerror = os.strerror(error.errno)
    assert files.describe_reading(error) == says


def test_what_is_not_a_run_is_told_without_numbers(tmp_path: Path) -> None:
    readers = (read_run, pipar_jax.load, lambda path: list(read_rounds(path)), checkpoint.facts)
    for read in readers:
        with pytest.raises(PiparError) as caught:
            read(tmp_path / "nothing")
        assert "No such file or directory" in str(caught.value)
        assert "[Errno" not in str(caught.value) and "\n" not in str(caught.value)
