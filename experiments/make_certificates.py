r"""Writes a small certificate authority and certificates for a trial with TLS.

  pipar make_certificates --folder=certificates \
      --host=server=192.0.2.7,server.example --host=n1=192.0.2.8 --host=d0 --host=d1

Each --host is the name of a host of the run (server, d0 for device 0, n1 for compute node 1),
followed by = and the addresses at which others reach it (server and nodes need them; devices do not
listen). A host is accepted only under a name in its certificate. Copy authority.pem, NAME.pem and
NAME.key to the host of that name, and keep authority.key on this machine.
"""

import os

from absl import flags

from pipar_jax.disk.files import check_folder
from pipar_jax.errors import ConfigError
from pipar_jax.launch import plain_flags
from pipar_jax.launch.certificates import (
    Certificates,
    add_certificate,
    check_host,
    check_new,
    make_authority,
)

_FOLDER = plain_flags.define_path("folder", "certificates", "Folder of the files.")
_HOST = flags.DEFINE_multi_string("host", [], "NAME or NAME=ADDRESS,ADDRESS; may be repeated.")
_DAYS = flags.DEFINE_integer("days", 30, "Validity of the certificates, in days.", lower_bound=1,
                             upper_bound=36_500)  # fmt: skip
_ADD = flags.DEFINE_boolean("add", False, "Add hosts to an existing authority.")


def main(arguments: list[str]) -> None:
    """Writes the files and prints where each belongs.

    Raises:
      ConfigError: No host is named, one is named twice or cannot have a certificate there, there is
        an authority already, or with --add none, or the folder cannot be written.
      PiparError: A file cannot be written.
    """
    del arguments
    if not _HOST.value:
        raise ConfigError("name at least one host, such as --host=server=192.0.2.7")
    files, hosts = Certificates(_FOLDER.value), dict[str, list[str]]()
    check_folder(files.folder, f"--folder={files.folder}")
    if not _ADD.value:
        check_new(files)
    elif not os.path.isfile(files.authority_key):
        raise ConfigError(f"{files.authority_key} does not exist; leave out --add to create it")
    for text in _HOST.value:  # all of them before anything is written
        name, _, addresses = text.partition("=")
        if name in hosts:
            raise ConfigError(f"--host={name} is named twice: give all of its addresses at once")
        hosts[name] = [each for each in addresses.split(",") if each]
        check_host(files, name, hosts[name])
    if not _ADD.value:
        make_authority(files.folder, days=_DAYS.value)
    for name, names in hosts.items():
        add_certificate(files, name, names, days=_DAYS.value)
        print(f"{name}: {files.authority}, {files.certificate(name)}, {files.key(name)}")
    print(f"Keep {files.authority_key} on this machine: anybody who has it can admit hosts.")


if __name__ == "__main__":
    plain_flags.run(main)
