"""A small certificate authority for trials, based on the library cryptography.

One authority, one certificate for each host, all on elliptic curves. A certificate names its host
(``server``, ``d0``, ``n1``) as a subject alternative name, in addition to the addresses at which
others reach it: with mutual TLS a host is accepted only under a name in its certificate. The
authority is meant for trials on machines of one owner: anybody with ``authority.key`` can admit
peers.
"""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from comms.errors import explain
from pipar_jax.disk import files as _files
from pipar_jax.errors import ConfigError, PiparError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_AUTHORITY = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "pipar_jax trial authority")])
#: Maximum by which clocks of other machines may lag behind this one's.
_SKEW = datetime.timedelta(minutes=5)


@dataclass(frozen=True)
class Certificates:
    """The paths of an authority's files.

    Attributes:
      folder: The folder that contains them all.
    """

    folder: Path

    @property
    def authority(self) -> Path:
        """The authority's certificate, which every machine needs."""
        return self.folder / "authority.pem"

    @property
    def authority_key(self) -> Path:
        """The authority's private key, which should not leave its machine."""
        return self.folder / "authority.key"

    def certificate(self, name: str) -> Path:
        """The certificate of a host."""
        return self.folder / f"{name}.pem"

    def key(self, name: str) -> Path:
        """The private key of a host, which only that host needs."""
        return self.folder / f"{name}.key"


def make_authority(folder: str | os.PathLike[str], *, days: int = 30) -> Certificates:
    """Writes a new authority.

    Args:
      folder: Target folder; created if missing.
      days: Validity of the authority, in days.

    Raises:
      ConfigError: The folder already contains an authority.
      PiparError: The folder cannot be written.
    """
    files = Certificates(Path(folder))
    check_new(files)
    key = ec.generate_private_key(ec.SECP256R1())
    identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    made = (
        _builder(_AUTHORITY, key, days)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .add_extension(identifier, critical=False)
        .sign(key, hashes.SHA256())
    )
    with _told(files.folder):
        files.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    _write_pair(files.authority, made, files.authority_key, key)
    return files


def check_new(files: Certificates) -> None:
    """Checks that there is no authority yet.

    Raises:
      ConfigError: There is one.
    """
    if os.path.lexists(files.authority) or os.path.lexists(files.authority_key):
        raise ConfigError(
            f"{files.folder} already contains an authority; name another folder, or delete this "
            "one if none of its certificates is in use"
        )


def check_host(files: Certificates, name: str, addresses: Sequence[str]) -> None:
    """Checks that a host can have a certificate of an authority, which may not exist yet.

    Args:
      files: The authority.
      name: Name of the host, as of ``add_certificate``.
      addresses: Host names and addresses under which others reach the host.

    Raises:
      ConfigError: The name is not a valid file name or is the authority's, the host already has a
        certificate or key there, or an address is not valid.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"{name!r} is not a valid name for a certificate: use letters, digits, . _ and -"
        )
    for path in (files.certificate(name), files.key(name)):
        if path in (files.authority, files.authority_key):
            raise ConfigError(f"{path} is the authority's own; choose another name than {name!r}")
        if os.path.lexists(path):
            raise ConfigError(f"{path} already exists; choose another name")
    for address in (name, *addresses):
        _alternative(address)


def add_certificate(
    files: Certificates, name: str, addresses: Sequence[str], *, days: int = 30
) -> None:
    """Writes key and certificate of one host, signed by the authority.

    Args:
      files: The authority.
      name: Name of the host: ``server``, ``d0`` for device 0, ``n1`` for compute node 1; also the
        name of the files and the first subject alternative name.
      addresses: Host names and addresses under which others reach the host.
      days: Validity of the certificate, in days.

    Raises:
      ConfigError: As ``check_host``.
      PiparError: A file cannot be read or written.
    """
    check_host(files, name, addresses)
    names = [_alternative(address) for address in dict.fromkeys((name, *addresses))]
    authority_key = _read_authority(files)
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    uses = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    made = (
        _builder(subject, key, days)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage(uses), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key()),
            critical=False,
        )
        .sign(authority_key, hashes.SHA256())
    )
    _write_pair(files.certificate(name), made, files.key(name), key)


def _builder(
    subject: x509.Name, key: ec.EllipticCurvePrivateKey, days: int
) -> x509.CertificateBuilder:
    """Returns a certificate of the authority without extensions."""
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(_AUTHORITY)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _SKEW)
        .not_valid_after(now + datetime.timedelta(days=days))
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _alternative(address: str) -> x509.GeneralName:
    with contextlib.suppress(ValueError):
        return x509.IPAddress(ipaddress.ip_address(address))
    if not re.fullmatch(r"(?:\*\.)?(?:[\w-]{1,63}\.)*[\w-]{1,63}\.?", address, re.ASCII):
        raise ConfigError(f"{address!r} is neither a host name nor an address")
    return x509.DNSName(address)


def _read_authority(files: Certificates) -> ec.EllipticCurvePrivateKey:
    with _told(files.folder):
        try:
            key = serialization.load_pem_private_key(files.authority_key.read_bytes(), None)
        except (ValueError, TypeError) as error:
            raise PiparError(
                f"{files.authority_key} is not a valid key: {error}; create another authority in "
                "another folder"
            ) from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise PiparError(
            f"{files.authority_key} is not an elliptic-curve key; create another authority"
        )
    return key


def _write_pair(
    certificate: Path, made: x509.Certificate, path: Path, key: ec.EllipticCurvePrivateKey
) -> None:
    """Writes a certificate and its key, of which neither exists yet: both, or none of them.

    Raises:
      DiskError: One of them cannot be written.
    """
    text = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    remedy = "choose another folder"
    try:
        _files.write_bytes(certificate, made.public_bytes(serialization.Encoding.PEM), remedy)
        _files.write_secret(path, text, remedy)  # last: who has the key has its certificate
    except BaseException:  # a half would be in the way of the next try
        for one in (certificate, path):
            with contextlib.suppress(OSError):
                one.unlink()
        raise


@contextlib.contextmanager
def _told(folder: Path) -> Iterator[None]:
    """Turns errors of the file system into one-line errors."""
    try:
        yield
    except OSError as error:
        raise PiparError(
            f"cannot use {error.filename or folder}: {explain(error)}; check the folder"
        ) from error
