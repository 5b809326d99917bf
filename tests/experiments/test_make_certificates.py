"""The binary that writes an authority and certificates."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="needs the openssl program")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "experiments.make_certificates", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_it_writes_what_openssl_verifies_and_never_overwrites(tmp_path):
    folder = tmp_path / "new"
    done = run(f"--folder={folder}", "--host=server=127.0.0.1,localhost", "--host=device0")
    assert done.returncode == 0, done.stderr
    for name in ("server", "device0"):
        check = ["openssl", "verify", "-CAfile", f"{folder}/authority.pem", f"{folder}/{name}.pem"]
        assert subprocess.run(check, capture_output=True, check=False).returncode == 0
        assert (folder / f"{name}.key").stat().st_mode & 0o077 == 0
    assert not list(folder.glob("*.csr")) and not list(folder.glob("*.ext"))

    again = run(f"--folder={folder}", "--host=device1")
    assert again.returncode == 1 and "holds an authority already" in again.stderr
    assert "Traceback" not in again.stderr
    assert run(f"--folder={folder}", "--add", "--host=device1").returncode == 0
    twice = run(f"--folder={folder}", "--add", "--host=device1")
    assert twice.returncode == 1 and "exists already" in twice.stderr
    wrong = run(f"--folder={folder}", "--add", "--host=../evil")
    assert wrong.returncode == 1 and "no name for a certificate" in wrong.stderr
