"""The command line of binaries with a configuration: a preset, and its fields as flags.

Every argument is checked against the schema before absl and ml_collections see it, because they
report an unknown field by a KeyError and list a single flag under ``--help``. Binaries without a
configuration are in ``plain_flags``.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import pathlib
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterable
from typing import Any, Generic, NamedTuple, NoReturn, TypeVar

from absl import app
from absl import flags as absl_flags
from ml_collections import config_flags

from pipar_jax import __version__
from pipar_jax.config import Config, DeviceConfig, NodeConfig, paths, plugins, schema
from pipar_jax.config.schema import ConfigField, option
from pipar_jax.disk.json_text import JsonObject
from pipar_jax.errors import ConfigError
from pipar_jax.launch.binary import begin, finish, show
from pipar_jax.methods.names import NAMES
from pipar_jax.methods.resolution import resolve

E = TypeVar("E")

_HOST = re.compile(r"(devices|nodes)\.(\d+)\.(\w+)")
_HOSTS = {"devices": DeviceConfig, "nodes": NodeConfig}
#: Types that ml_collections' flags can set; other types (unions, None) are set here.
_PLAIN = ((bool,), (int,), (float,), (str,))


@dataclasses.dataclass
class NoFlags:
    """No flags in addition to the common ones."""


@dataclasses.dataclass
class Common:
    """The common flags of all binaries."""

    config: str = option(
        "", "preset to start from: a name listed above, or your own file, such as ./mine.py"
    )
    flagfile: str = option("", "file with further flags, one per line")
    debug: bool = option(False, "show tracebacks (short for --config.debug)")
    version: bool = option(False, "print the version and exit")
    help: bool = option(False, "print this help and exit")


class Parsed(NamedTuple, Generic[E]):
    """A parsed command line.

    Attributes:
      config: The preset with its overrides, not yet resolved; the defaults with --help or
        --version.
      extra: The binary's own flags.
      text: The output of --help or --version; otherwise empty.
    """

    config: Config
    extra: E
    text: str


def run(
    main: Callable[[Config, E], None],
    extra: type[E],
    *,
    doc: str,
    name: str,
    presets: pathlib.Path,
    preset: str = "",
) -> NoReturn:
    """Parses the command line, runs a binary's main under absl and ends the process.

    The exit code is 0, 1 after an error (one line on standard error), 2 for a wrong command line
    or configuration, 130 after Ctrl-C and 143 after SIGTERM.

    Args:
      main: Called with the resolved configuration and the binary's own flags.
      extra: Dataclass of ``option`` fields: the binary's own flags.
      doc: Description of the binary, with which its help begins.
      name: The command after ``pipar``, for the help.
      presets: Folder of the presets that are known by name.
      preset: The default preset; empty: the command line has to name one.
    """

    def read(arguments: list[str]) -> tuple[Config, E]:
        if preset:  # a later --config takes precedence
            arguments.insert(0, f"--config={preset}")
        parsed = parse(arguments, extra, doc=doc, name=name, presets=presets)
        if parsed.text:
            show(parsed.text)
        return resolve(parsed.config), parsed.extra

    config, own = begin(read)
    app.run(lambda _: finish(lambda: main(config, own), debug=config.debug), argv=sys.argv[:1])


def parse(
    arguments: list[str], extra: type[E], *, doc: str, name: str, presets: pathlib.Path
) -> Parsed[E]:
    """Reads a command line.

    Args:
      arguments: The command line without the program's name.
      extra: Dataclass of the binary's own flags.
      doc: Description of the binary.
      name: The command after ``pipar``.
      presets: Folder of the presets that are known by name.

    Raises:
      ConfigError: A flag is unknown (the message suggests the nearest), lacks a value or has an
        invalid one, or the preset cannot be loaded.
    """
    own = {option.path: option for kind in (Common, extra) for option in schema.options(kind)}
    fields = {f"config.{option.path}": option for option in schema.options(Config, names=NAMES)}
    values: JsonObject = {}
    changes: dict[str, tuple[ConfigField, str]] = {}
    for flag, text in _pairs(arguments, {**own, **fields}):
        if flag in own:
            option = own[flag]._replace(path=f"--{flag}")
            values[flag] = paths.expand(option, schema.parse(option, text))
        else:
            option = fields.get(flag) or _find_host(flag)
            schema.parse(option._replace(path=f"--{flag}"), text)
            changes[option.path] = (option, text)
    if (debug := values.pop("debug", None)) is not None:
        changes["debug"] = (fields["config.debug"], _as_text(debug))
    preset, wants_help = values.pop("config", ""), values.pop("help", False)
    if values.pop("version", False):
        return Parsed(Config(), extra(**values), f"pipar {__version__}")
    if not preset and not wants_help:
        known = ", ".join(_preset_names(presets))
        raise ConfigError(f"--config is missing: name a preset ({known}) or your own file")
    config = load_preset(preset, presets) if preset else Config()
    config = _apply(config, changes)
    text = make_help(config, extra, doc=doc, name=name, presets=presets) if wants_help else ""
    return Parsed(config, extra(**values), text)


def parse_address(text: str, said: str) -> tuple[str, int]:
    """Returns host and port of a text such as ``192.0.2.7:7000``.

    Args:
      text: The text.
      said: What the message calls it, such as ``--server``.

    Raises:
      ConfigError: The text is not an address.
    """
    match = re.fullmatch(r"\[?(.+?)\]?:(\d{1,5})", text)
    if match is None or not 0 < int(match[2]) < 65536:
        raise ConfigError(f"{said}={text!r} is not valid: write {said}=HOST:PORT")
    return match[1], int(match[2])


def load_preset(name: str, presets: pathlib.Path) -> Config:
    """Returns the configuration of a preset.

    Args:
      name: The name of a preset in ``presets``, or a file. A name with a folder or ``.py`` is
        looked up as a file first.
      presets: Folder of the presets that are known by name.

    Raises:
      ConfigError: There is no such file, or it does not return a configuration.
    """
    path = _find_preset(name, presets)
    if path is None:
        known = _preset_names(presets)
        near = schema.did_you_mean(pathlib.Path(name).stem, known)
        raise ConfigError(
            f"--config={name} is not a preset{near} (known: {', '.join(known)}, or a file)"
        )
    spec = importlib.util.spec_from_file_location(f"_pipar_preset_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"--config={name} must be a Python file with a function get_config()")
    loaded = importlib.util.module_from_spec(spec)
    with plugins.guarded(f"--config={name} fails", ConfigError):
        spec.loader.exec_module(loaded)
        config = loaded.get_config()
    if not isinstance(config, Config):
        raise ConfigError(
            f"--config={name}: get_config() must return a pipar_jax.config.Config, got "
            f"{type(config).__name__}"
        )
    return config


def make_help(
    config: Config, extra: type[Any], *, doc: str, name: str, presets: pathlib.Path
) -> str:
    """Returns the complete help: usage, flags, and every field with its value.

    Args:
      config: The configuration whose values are shown.
      extra: Dataclass of the binary's own flags.
      doc: Description of the binary.
      name: The command after ``pipar``.
      presets: Folder of the presets.
    """
    width = terminal_width()
    parts = [
        doc.strip(),
        f"usage: pipar {name} --config=PRESET [--config.FIELD=VALUE ...]",
        textwrap.fill(
            f"presets: {', '.join(_preset_names(presets))}",
            width,
            subsequent_indent="  ",
            break_on_hyphens=False,
        ),
    ]
    own = [*schema.options(extra), *schema.options(Common)]
    rows = [(f"--{option.path}", option.text) for option in own]
    parts.append("\n".join(["flags:", *two_columns(rows, width)]))
    kinds = {field.name: type(getattr(config, field.name)) for field in dataclasses.fields(config)}
    groups: dict[str, list[tuple[str, str]]] = {}
    for entry in schema.options(Config, names=NAMES):
        group, _, _ = entry.path.rpartition(".")
        value: Any = config
        for field in entry.path.split("."):
            value = getattr(value, field)
        if entry.path == "network.token" and value is not None:
            value = "(hidden)"
        takes = "" if entry.expects == "a text" else f"; {entry.expects}"
        row = (f"--config.{entry.path}={_as_text(value)}", f"{entry.text}{takes}")
        groups.setdefault(group, []).append(row)
    for group, rows in groups.items():
        kind = _HOSTS.get(group.removesuffix(".defaults")) or kinds.get(group, Config)
        about = (kind.__doc__ or "").strip().splitlines()[0]
        head = textwrap.wrap(f"{group or 'run'}: {about}", width)
        parts.append("\n".join([*head, *two_columns(rows, width)]))
    parts.append(
        "one device or node:\n"
        + "\n".join(
            textwrap.wrap(
                "--config.devices.1.link=4g changes a field of device 1 only; any field of "
                "devices.defaults can be changed so. Nodes likewise: --config.nodes.1.slowdown=4.",
                width,
                initial_indent="  ",
                subsequent_indent="  ",
            )
        )
    )
    return "\n\n".join(parts)


def _pairs(arguments: list[str], known: dict[str, ConfigField]) -> Iterable[tuple[str, str]]:
    """Yields the flags as (name, text), whichever of absl's spellings they have."""
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        match = re.fullmatch(r"--?([A-Za-z][\w.-]*)(?:=(.*))?", argument, re.DOTALL)
        if match is None:
            raise ConfigError(f"{argument!r} is not a flag: flags look like --config.epochs=3")
        name, text = match[1], match[2]
        if name in ("h", "helpfull", "helpshort"):
            name = "help"
        negated = known.get(name.removeprefix("no")) if name not in known else None
        if text is None and negated is not None and negated.types == (bool,):
            name, text = name.removeprefix("no"), "false"
        option = known.get(name)
        if option is None and not _HOST.fullmatch(name.removeprefix("config.")):
            near = schema.did_you_mean(f"--{name}", [f"--{path}" for path in known])
            raise ConfigError(f"--{name} is not a flag{near} (all of them: --help)")
        if text is None:
            if option is not None and option.types == (bool,):
                text = "true"
            elif rest and not rest[0].startswith("--"):
                text = rest.pop(0)
            else:
                raise ConfigError(f"--{name} lacks its value: write --{name}=VALUE")
        yield name, text


def _find_host(name: str) -> ConfigField:
    """Returns the option that ``config.devices.1.link`` or ``config.nodes.1.link`` names."""
    path = name.removeprefix("config.")
    match = _HOST.fullmatch(path)
    assert match is not None, name
    own = {option.path: option for option in schema.options(_HOSTS[match[1]])}
    if match[3] not in own:
        near = schema.did_you_mean(match[3], own)
        raise ConfigError(
            f"--{name} is not a flag of a {match[1].removesuffix('s')}{near} (all of them: --help)"
        )
    return own[match[3]]._replace(path=path)


def _apply(config: Config, changes: dict[str, tuple[ConfigField, str]]) -> Config:
    plain = []
    for path, (entry, text) in changes.items():
        if (match := _HOST.fullmatch(path)) is not None:
            fields = getattr(config, match[1]).overrides.setdefault(int(match[2]), {})
            fields[match[3]] = schema.parse(entry, text)
        elif entry.types in _PLAIN:
            plain.append(f"--config.{path}={_as_text(schema.parse(entry, text))}")
        else:
            holder: Any = config
            *groups, name = path.split(".")
            for group in groups:
                holder = getattr(holder, group)
            setattr(holder, name, schema.parse(entry, text))
    # Flags of its own for each call: nothing is left in absl's global ones.
    values = absl_flags.FlagValues()  # type: ignore[no-untyped-call]
    flag = config_flags.DEFINE_config_dataclass(
        "config", config, flag_values=values, sys_argv=["", *plain]
    )
    values(["", *plain])
    made: Config = flag.value
    return made


def terminal_width() -> int:
    """Returns how many characters wide help is printed."""
    return min(shutil.get_terminal_size((100, 24)).columns, 110)


def _find_preset(name: str, presets: pathlib.Path) -> pathlib.Path | None:
    """Returns the file that a preset's name or path means, or None."""
    try:
        path = pathlib.Path(name).expanduser()
    except RuntimeError:  # ~somebody, whom this system does not know
        return None
    listed = presets / f"{path.stem}.py"
    bare = path.parent == pathlib.Path() and not name.startswith(".")
    # A file of the user's that happens to be called as a preset is does not hide it.
    places = [path]
    if bare:
        places = [path, listed] if path.suffix else [listed, path]
    return next((place for place in places if os.path.isfile(place)), None)


def _preset_names(presets: pathlib.Path) -> list[str]:
    return sorted(path.stem for path in presets.glob("*.py") if not path.stem.startswith("_"))


def _as_text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) or value is None else str(value)


def two_columns(rows: list[tuple[str, str]], width: int) -> list[str]:
    """Returns lines with names at the left and their texts, wrapped, at the right.

    Args:
      rows: (name, text).
      width: Characters of the longest line.
    """
    left = min(max(len(name) for name, _ in rows) + 4, 44)
    lines: list[str] = []
    for name, text in rows:
        wrapped = textwrap.wrap(text, width - left) or [""]
        if len(name) + 4 > left:  # too long to stand beside its text
            lines.append(f"  {name}")
        else:
            lines.append(f"  {name}".ljust(left) + wrapped.pop(0))
        lines += [" " * left + line for line in wrapped]
    return lines
