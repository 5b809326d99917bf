"""Sharing jax's cache of compiled programs between the processes of a machine.

Jax writes an entry in place. A process that looks while another one writes, or after one was
killed, reads half a program: jax warns, compiles it anew and, as a file of that name exists, never
replaces it. Here an entry appears whole or not at all, and a damaged one is removed. What several
processes need at once is compiled by one of them; see ``stages.compile_once``.
"""

from __future__ import annotations

import contextlib
import os
import uuid
from pathlib import Path
from typing import Any

from stages.compile_once import once

#: How the name of an entry's file ends: jax's own.
ENTRY_SUFFIX = "-cache"


def share_compile_cache() -> bool:
    """Makes this process read and write jax's cache so that other processes can use it meanwhile.

    It takes effect if it is called before the first compilation. A cache elsewhere than on a local
    disk, or one whose size the user limits (jax then locks it), stays as it is.

    Returns:
      Whether this version of jax has the internals that are replaced.
    """
    try:
        from jax._src import compilation_cache, compiler
        from jax._src.lru_cache import LRUCache

        decompress = compilation_cache.decompress_executable
        open_plain: Any = compilation_cache.get_file_cache
        compile_plain: Any = compiler._compile_and_write_cache
        read: Any = compiler._cache_read
        find_cache = compilation_cache._get_cache
    except (ImportError, AttributeError):
        return False
    if getattr(open_plain, "whole_entries", False):
        return True

    class WholeEntries(LRUCache):  # type: ignore[misc]
        """A cache on the local disk in which every entry is whole."""

        def get(self, key: str) -> bytes | None:
            value: bytes | None = super().get(key)
            if value is None:
                return None
            try:
                decompress(value)
            except Exception:  # of zlib or of either zstandard, which share no narrower type
                with contextlib.suppress(OSError):  # another process was first, or may only read
                    os.unlink(self._entry(key))
                return None
            return value

        def put(self, key: str, value: bytes) -> None:
            if not self._entry(key).exists():
                _write_whole(self._entry(key), value)

        def _entry(self, key: str) -> Path:
            return Path(str(self.path), f"{key}{ENTRY_SUFFIX}")

    def open_cache(path: str) -> Any:
        opened = open_plain(path)
        plain = opened is not None and type(opened[0]) is LRUCache
        if plain and not opened[0].eviction_enabled and "://" not in path:
            return WholeEntries(path, max_size=-1), path
        return opened

    def folder(backend: Any) -> Path | None:
        cache = find_cache(backend)
        return Path(str(cache.path)) if isinstance(cache, WholeEntries) else None

    open_cache.whole_entries = True  # type: ignore[attr-defined]
    compilation_cache.get_file_cache = open_cache
    compiler._compile_and_write_cache = once(compile_plain, folder, read) or compile_plain
    return True


def _write_whole(path: Path, content: bytes) -> None:
    """Writes a file under another name and renames it; nothing is left behind if that fails."""
    # Not forced to the disk: after a power failure a damaged entry is compiled again.
    aside = path.with_name(f".{uuid.uuid4().hex}")
    try:
        with open(aside, "xb") as file:  # whoever may read the folder may read the entry, as jax's
            file.write(content)
        os.replace(aside, path)
    except BaseException:
        with contextlib.suppress(OSError):  # the first error is the one to report
            os.unlink(aside)
        raise
