"""The binary that writes an authority and certificates."""

from __future__ import annotations

import subprocess
import sys

import pytest
from cryptography import x509

from pipar_jax.disk import files as disk_files
from pipar_jax.errors import DiskError, PiparError
from pipar_jax.launch import certificates
from pipar_jax.launch.certificates import add_certificate, make_authority
from tests.patience import PROCESS_S


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "experiments.make_certificates", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=PROCESS_S, check=False)


def test_it_writes_signed_names_and_never_overwrites(tmp_path):
    folder = tmp_path / "new"
    done = run(f"--folder={folder}", "--host=server=127.0.0.1,localhost", "--host=d0")
    assert done.returncode == 0, done.stderr
    authority = x509.load_pem_x509_certificate((folder / "authority.pem").read_bytes())
    for name in ("server", "d0"):
        made = x509.load_pem_x509_certificate((folder / f"{name}.pem").read_bytes())
        made.verify_directly_issued_by(authority)
        names = made.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        assert names.get_values_for_type(x509.DNSName)[0] == name
        assert (folder / f"{name}.key").stat().st_mode & 0o077 == 0

    again = run(f"--folder={folder}", "--host=d1")
    assert again.returncode == 2 and "already contains an authority" in again.stderr
    assert "Traceback" not in again.stderr
    assert run(f"--folder={folder}", "--add", "--host=d1").returncode == 0
    twice = run(f"--folder={folder}", "--add", "--host=d1")
    assert twice.returncode == 2 and "already exists" in twice.stderr
    wrong = run(f"--folder={folder}", "--add", "--host=../evil")
    assert wrong.returncode == 2 and "not a valid name for a certificate" in wrong.stderr


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("hosts", "says"),
    [
        (["server=127.0.0.1", "ser ver"], "'ser ver' is not a valid name"),
        (["server=127.0.0.1,x/y"], "'x/y' is neither a host name nor an address"),
        (["d0", "d1", "d0"], "--host=d0 is named twice"),
        (["authority"], "is the authority's own"),
        (["taken"], "taken.key already exists"),
        ([], "name at least one host"),
    ],
)
def test_a_wrong_host_is_told_before_anything_is_written(tmp_path, hosts, says):
    (tmp_path / "taken.key").touch()
    done = run(f"--folder={tmp_path}", *(f"--host={host}" for host in hosts))
    assert done.returncode == 2 and says in done.stderr, done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["taken.key"]


@pytest.mark.parametrize("damage", ["missing", "garbage"])
def test_an_authority_that_cannot_be_read_is_named(tmp_path, damage):
    files = make_authority(tmp_path)
    files.authority_key.unlink() if damage == "missing" else files.authority_key.write_text("x")
    with pytest.raises(PiparError, match=r"authority\.key"):
        add_certificate(files, "d0", [])


@pytest.mark.parametrize("address", ["a b", "é", "x/y", "1.2.3.4.5 ", "a..b", ".", "a" * 64])
def test_what_is_no_address_is_refused_and_leaves_no_file(tmp_path, address):
    files = make_authority(tmp_path)
    with pytest.raises(PiparError, match="neither a host name nor an address"):
        add_certificate(files, "d0", [address])
    assert not files.key("d0").exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt, DiskError])
def test_half_a_pair_is_not_left_in_the_way(tmp_path, monkeypatch, error):
    def refuse(path, content, remedy):
        raise error

    write = disk_files.write_secret
    for make in (
        lambda: make_authority(tmp_path),
        lambda: add_certificate(certificates.Certificates(tmp_path), "d0", []),
    ):
        before = sorted(path.name for path in tmp_path.iterdir())
        monkeypatch.setattr(disk_files, "write_secret", refuse)
        with pytest.raises(error):
            make()
        assert sorted(path.name for path in tmp_path.iterdir()) == before
        monkeypatch.setattr(disk_files, "write_secret", write)
        make()
    files = certificates.Certificates(tmp_path)
    assert files.key("d0").stat().st_mode & 0o077 == 0


def test_a_folder_that_cannot_be_made_is_an_error_of_the_command_line(tmp_path):
    (tmp_path / "file").touch()
    done = run(f"--folder={tmp_path}/file/below", "--host=d0")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"error: --folder={tmp_path}/file/below cannot be used")
