"""Processes of a machine share compiled programs: no one ever reads half of one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from stages.compile_cache import ENTRY_SUFFIX, share_compile_cache
from tests.patience import PROCESS_S

# Compiles a program with the cache in a folder, and prints how many it found and compiled.
COMPILE = """
import sys, warnings
warnings.simplefilter("error")
import jax, jax.numpy as jnp
from stages.compile_cache import share_compile_cache
assert share_compile_cache() and share_compile_cache()
jax.config.update("jax_compilation_cache_dir", sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
counts = {"/jax/compilation_cache/cache_hits": 0, "/jax/compilation_cache/cache_misses": 0}
def count(name, **_):
    if name in counts:
        counts[name] += 1
jax.monitoring.register_event_listener(count)
assert jax.jit(lambda x: jnp.sin(x) * 3 + 1)(jnp.float32(2.0)) > 3
print(*counts.values())
"""


def compile_once(folder: Path) -> tuple[int, int]:
    """Returns how many programs another process found in the cache, and how many it compiled."""
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, str(folder)],
        capture_output=True,
        text=True,
        timeout=PROCESS_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    hits, misses = map(int, done.stdout.split())
    return hits, misses


def test_an_entry_that_was_cut_off_is_replaced_without_a_warning(tmp_path: Path) -> None:
    _, compiled = compile_once(tmp_path)
    entries = sorted(tmp_path.iterdir())
    assert compiled == len(entries) > 0
    assert all(entry.name.endswith(ENTRY_SUFFIX) for entry in entries)
    assert compile_once(tmp_path) == (compiled, 0)
    whole = {entry: entry.read_bytes() for entry in entries}
    for entry, content in whole.items():
        entry.write_bytes(content[: len(content) // 2])
    assert compile_once(tmp_path) == (0, compiled)
    assert sorted(tmp_path.iterdir()) == entries
    assert compile_once(tmp_path) == (compiled, 0)


@pytest.fixture
def cache(tmp_path: Path):
    from jax._src import compilation_cache

    assert share_compile_cache()
    return compilation_cache.get_file_cache(str(tmp_path))[0]


def test_an_entry_appears_whole_or_not_at_all(cache, tmp_path: Path, monkeypatch) -> None:
    from stages import compile_cache

    def fail(source: str, target: Path) -> None:
        assert Path(source).stat().st_size == 3 and not list(tmp_path.glob("*" + ENTRY_SUFFIX))
        raise OSError("no space left")

    monkeypatch.setattr(compile_cache.os, "replace", fail)
    with pytest.raises(OSError, match="no space"):
        cache.put("key", b"abc")
    assert not list(tmp_path.iterdir())


def test_users_who_share_a_cache_can_read_each_others_entries(cache, tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        cache.put("key", b"abc")
    finally:
        os.umask(before)
    (entry,) = tmp_path.iterdir()
    assert entry.stat().st_mode & 0o777 == 0o644
