r"""Writes a small certificate authority and certificates for a trial with TLS.

  pipar make_certificates --folder=certificates \
      --host=server=192.0.2.7,server.example --host=n1=192.0.2.8 --host=d0 --host=d1

Each --host is the name of a host of the run (server, d0 for device 0, n1 for compute node 1),
followed by = and the addresses at which others reach it (server and nodes need them; devices do not
listen). A host is accepted only under a name in its certificate. Copy authority.pem, NAME.pem and
NAME.key to the host of that name, and keep authority.key on this machine.
"""

from absl import flags

from pipar_jax.errors import ConfigError, PiparError
from pipar_jax.launch import plain_flags
from pipar_jax.launch.certificates import Certificates, add_certificate, make_authority

_FOLDER = plain_flags.define_path("folder", "certificates", "Folder of the files.")
_HOST = flags.DEFINE_multi_string("host", [], "NAME or NAME=ADDRESS,ADDRESS; may be repeated.")
_DAYS = flags.DEFINE_integer("days", 30, "Validity of the certificates, in days.", lower_bound=1)
_ADD = flags.DEFINE_boolean("add", False, "Add hosts to an existing authority.")


def main(arguments: list[str]) -> None:
    """Writes the files and prints where each belongs.

    Raises:
      PiparError: No host is named, or a file cannot be created.
    """
    del arguments
    if not _HOST.value:
        raise ConfigError("name at least one host, such as --host=server=192.0.2.7")
    files = _authority()
    for host in _HOST.value:
        name, _, addresses = host.partition("=")
        add_certificate(
            files, name, [each for each in addresses.split(",") if each], days=_DAYS.value
        )
        print(f"{name}: {files.authority}, {files.certificate(name)}, {files.key(name)}")
    print(f"Keep {files.authority_key} on this machine: anybody who has it can admit hosts.")


def _authority() -> Certificates:
    if not _ADD.value:
        return make_authority(_FOLDER.value, days=_DAYS.value)
    files = Certificates(_FOLDER.value)
    if not files.authority_key.exists():
        raise PiparError(f"{files.authority_key} does not exist; leave out --add to create it")
    return files


if __name__ == "__main__":
    plain_flags.run(main)
