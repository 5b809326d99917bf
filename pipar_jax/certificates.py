"""A small certificate authority for a trial, made with the openssl program.

One authority, one certificate for the server and one for each device, all on elliptic curves. It
is meant for a trial among machines of one owner: whoever holds ``authority.key`` can admit peers.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from comms.errors import explain
from pipar_jax.errors import PiparError

_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")


@dataclass(frozen=True)
class Certificates:
    """Where the files of one authority lie.

    Attributes:
        folder: the folder of all files.
    """

    folder: Path

    @property
    def authority(self) -> Path:
        """The authority's certificate: every machine needs it."""
        return self.folder / "authority.pem"

    @property
    def authority_key(self) -> Path:
        """The authority's private key: it stays where it was made."""
        return self.folder / "authority.key"

    def certificate(self, name: str) -> Path:
        """The certificate of a host."""
        return self.folder / f"{name}.pem"

    def key(self, name: str) -> Path:
        """The private key of a host: only that host needs it."""
        return self.folder / f"{name}.key"


def make_authority(folder: str | os.PathLike[str], *, days: int = 30) -> Certificates:
    """Writes a new authority.

    Args:
        folder: where to; made if it does not exist.
        days: how long the authority is valid.

    Raises:
        PiparError: if there is one already, or openssl is missing or fails.
    """
    files = Certificates(Path(folder))
    if files.authority.exists() or files.authority_key.exists():
        raise PiparError(
            f"{files.folder} holds an authority already; name another folder, or delete that one "
            "if none of its certificates is in use"
        )
    try:
        files.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise PiparError(f"cannot make the folder {files.folder}: {explain(error)}") from error
    _make_key(files.authority_key)
    _openssl(
        "req", "-x509", "-new", "-key", str(files.authority_key), "-sha256", "-days", str(days),
        "-subj", "/CN=pipar_jax trial authority", "-out", str(files.authority),
        "-addext", "keyUsage=critical,keyCertSign,cRLSign",
    )  # fmt: skip
    return files


def add_certificate(
    files: Certificates, name: str, addresses: Sequence[str], *, days: int = 30
) -> None:
    """Writes key and certificate of one host, signed by the authority.

    Args:
        files: the authority.
        name: names the files and the host.
        addresses: host names and addresses under which others reach the host.
        days: how long the certificate is valid.

    Raises:
        PiparError: if the name is no file name, the certificate exists, or openssl fails.
    """
    if not _NAME.match(name):
        raise PiparError(f"{name!r} is no name for a certificate: use letters, digits, . _ and -")
    if files.certificate(name).exists():
        raise PiparError(f"{files.certificate(name)} exists already; choose another name")
    _make_key(files.key(name))
    request, extensions = files.folder / f"{name}.csr", files.folder / f"{name}.ext"
    names = ",".join(_alternative(address) for address in dict.fromkeys((name, *addresses)))
    try:
        extensions.write_text(
            f"subjectAltName={names}\nbasicConstraints=critical,CA:FALSE\n"
            "keyUsage=critical,digitalSignature\nextendedKeyUsage=serverAuth,clientAuth\n"
        )
        _openssl(
            "req", "-new", "-key", str(files.key(name)), "-subj", f"/CN={name}",
            "-out", str(request),
        )  # fmt: skip
        _openssl(
            "x509", "-req", "-in", str(request), "-CA", str(files.authority),
            "-CAkey", str(files.authority_key), "-CAcreateserial", "-days", str(days), "-sha256",
            "-extfile", str(extensions), "-out", str(files.certificate(name)),
        )  # fmt: skip
    finally:
        for leftover in (request, extensions):
            leftover.unlink(missing_ok=True)


def _alternative(address: str) -> str:
    with contextlib.suppress(ValueError):
        return f"IP:{ipaddress.ip_address(address)}"
    if not re.fullmatch(r"[A-Za-z0-9._*-]+", address):
        raise PiparError(f"{address!r} is neither a host name nor an address")
    return f"DNS:{address}"


def _make_key(path: Path) -> None:
    # Made empty and private first, so that the key is never readable by others, not even briefly.
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    _openssl(
        "genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256", "-out", str(path)
    )


def _openssl(*arguments: str) -> None:
    program = shutil.which("openssl")
    if program is None:
        raise PiparError("the program openssl is not installed; it makes the certificates")
    done = subprocess.run(
        [program, *arguments], capture_output=True, text=True, timeout=60, check=False
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise PiparError(f"openssl {arguments[0]} failed: {last}")
