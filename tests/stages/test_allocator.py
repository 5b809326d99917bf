"""Keeping freed memory in the process."""

from __future__ import annotations

import subprocess
import sys

import pytest

# Faults in 64 MB eight times; counts the minor page faults of the last four rounds.
FAULTS = """
import ctypes, resource, sys
import stages
assert "jax" not in sys.modules
if {retain}:
    assert stages.retain_memory()
library = ctypes.CDLL(None)
library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
library.free.argtypes = [ctypes.c_void_p]
for round in range(8):
    if round == 4:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = library.malloc(1 << 26)
    ctypes.memset(block, 1, 1 << 26)
    library.free(block)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


# Frees 64 MB that nothing else uses, and prints the resident megabytes before and after returning.
RETURNED = """
import ctypes
import stages
def resident():
    pages = int(open("/proc/self/statm").read().split()[1])
    return pages * 4096 / 1e6
assert stages.retain_memory()
library = ctypes.CDLL(None)
library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
library.free.argtypes = [ctypes.c_void_p]
block, barrier = library.malloc(1 << 26), library.malloc(1 << 20)
ctypes.memset(block, 1, 1 << 26)
library.free(block)
before = resident()
stages.return_memory()
print(before - resident())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="malloc_trim is glibc's")
def test_what_is_returned_is_no_longer_resident():
    command = [sys.executable, "-c", RETURNED]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert float(done.stdout) > 60


def _faults(retain: bool) -> int:
    code = FAULTS.format(retain=retain)
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return int(done.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mallopt is glibc's")
def test_freed_blocks_are_reused_without_page_faults():
    assert _faults(retain=True) < 100 < _faults(retain=False)
