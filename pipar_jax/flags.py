"""The command line of the binaries: a preset, its fields as flags, and help that knows them all.

Every argument is checked against the schema before absl and ml_collections see it, because left
alone they answer an unknown field with a KeyError and list one flag under ``--help``.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import pathlib
import re
import shutil
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterable
from typing import Any, Generic, NamedTuple, NoReturn, TypeVar

from absl import app
from absl import flags as absl_flags
from ml_collections import config_flags

from pipar_jax import plugins, schema
from pipar_jax.config import Config, DeviceConfig, NodeConfig, resolve
from pipar_jax.errors import ConfigError
from pipar_jax.process import INTERRUPTED, leave, perform
from pipar_jax.schema import Option, option

E = TypeVar("E")

_WRONG_USE = 2
_HOST = re.compile(r"(devices|nodes)\.(\d+)\.(\w+)")
_HOSTS = {"devices": DeviceConfig, "nodes": NodeConfig}
#: Types that ml_collections' flags can set; the others (unions, none, devices) are set here.
_PLAIN = ((bool,), (int,), (float,), (str,))


@dataclasses.dataclass
class NoFlags:
    """A binary without flags of its own."""


@dataclasses.dataclass
class Common:
    """Flags that every binary has."""

    config: str = option("", "preset to start from: a name listed above, or a file of your own")
    debug: bool = option(False, "show tracebacks (short for --config.debug)")
    help: bool = option(False, "print this and end")


class Parsed(NamedTuple, Generic[E]):
    """What a command line says.

    Attributes:
      config: The preset with its overrides, not resolved yet; None if only help is wanted.
      extra: The binary's own flags.
      help: The help text if it is asked for, else empty.
    """

    config: Config
    extra: E
    help: str


def run(
    main: Callable[[Config, E], None],
    extra: type[E],
    *,
    doc: str,
    module: str,
    presets: pathlib.Path,
) -> NoReturn:
    """Parses the command line, runs a binary's main under absl and ends the process.

    The exit code is 0, 1 after an error (one line on standard error), 2 for a wrong command line
    or configuration, and 130 after Ctrl-C.

    Args:
      main: Takes the resolved configuration and the binary's own flags.
      extra: Dataclass of ``option`` fields: the binary's own flags.
      doc: What the binary does; its help begins with it.
      module: Name that follows ``python -m``, for the help.
      presets: Folder of the presets that can be named without a path.
    """
    debug = any(argument.lstrip("-") in ("debug", "config.debug") for argument in sys.argv[1:])
    try:
        parsed = parse(sys.argv[1:], extra, doc=doc, module=module, presets=presets)
        if parsed.help:
            print(parsed.help)
            leave(0)
        config = resolve(parsed.config)
    except ConfigError as error:
        if debug:
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        leave(_WRONG_USE)
    except KeyboardInterrupt:
        leave(INTERRUPTED)
    except BrokenPipeError:  # somebody read the head of the help
        leave(0)

    def tell(event: dict[str, Any]) -> None:
        print(f"error: {event['error']}", file=sys.stderr)

    def body(_: list[str]) -> None:
        code = perform(lambda: main(config, parsed.extra), tell, debug=config.debug)
        if code == INTERRUPTED:
            print("interrupted", file=sys.stderr)
        leave(code)

    app.run(body, argv=sys.argv[:1])


def parse(
    arguments: list[str], extra: type[E], *, doc: str, module: str, presets: pathlib.Path
) -> Parsed[E]:
    """Reads a command line.

    Args:
      arguments: What follows the program's name.
      extra: Dataclass of the binary's own flags.
      doc: What the binary does.
      module: Name that follows ``python -m``.
      presets: Folder of the presets that can be named without a path.

    Raises:
      ConfigError: A flag is unknown (the nearest is named), lacks a value or has a wrong one, or
        the preset cannot be loaded.
    """
    own = {one.path: one for kind in (Common, extra) for one in schema.options(kind)}
    fields = {f"config.{one.path}": one for one in schema.options(Config)}
    values: dict[str, Any] = {}
    changes: dict[str, tuple[Option, str]] = {}
    for name, text in _pairs(arguments, {**own, **fields}):
        if name in own:
            values[name] = schema.parse(own[name]._replace(path=f"--{name}"), text)
        else:
            one = fields.get(name) or _find_host(name)
            schema.parse(one._replace(path=f"--{name}"), text)
            changes[one.path] = (one, text)
    if values.pop("debug", False):
        changes["debug"] = (fields["config.debug"], "true")
    name, wants_help = values.pop("config", ""), values.pop("help", False)
    if not name and not wants_help:
        known = ", ".join(_preset_names(presets))
        raise ConfigError(f"--config is missing: name a preset ({known}) or a file of your own")
    config = load_preset(name, presets) if name else Config()
    config = _apply(config, changes)
    text = make_help(config, extra, doc=doc, module=module, presets=presets) if wants_help else ""
    return Parsed(config, extra(**values), text)


def parse_address(text: str, flag: str) -> tuple[str, int]:
    """Returns host and port of a flag such as ``--server=192.0.2.7:7000``.

    Raises:
      ConfigError: The text is no address.
    """
    found = re.fullmatch(r"\[?(.+?)\]?:(\d{1,5})", text)
    if found is None or not 0 < int(found[2]) < 65536:
        raise ConfigError(f"--{flag}={text!r} does not fit: write --{flag}=HOST:PORT")
    return found[1], int(found[2])


def load_preset(name: str, presets: pathlib.Path) -> Config:
    """Returns what a preset's ``get_config`` makes.

    Args:
      name: A file, or the name of one in ``presets``.
      presets: Folder of the presets that can be named without a path.

    Raises:
      ConfigError: There is no such file, or it does not make a configuration.
    """
    path = pathlib.Path(name).expanduser()
    if not path.is_file() and path.parent == pathlib.Path():
        path = presets / f"{path.stem}.py"
    if not path.is_file():
        known = _preset_names(presets)
        near = schema.did_you_mean(pathlib.Path(name).stem, known)
        raise ConfigError(f"--config={name} is no preset{near} (known: {', '.join(known)})")
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
    config: Config, extra: type[Any], *, doc: str, module: str, presets: pathlib.Path
) -> str:
    """Returns the whole help: usage, the binary's flags, and every field with its value.

    Args:
      config: Whose values are shown as the present ones.
      extra: Dataclass of the binary's own flags.
      doc: What the binary does.
      module: Name that follows ``python -m``.
      presets: Folder of the presets.
    """
    width = min(shutil.get_terminal_size((100, 24)).columns, 110)
    parts = [
        doc.strip(),
        f"usage: python -m {module} --config=PRESET [--config.FIELD=VALUE ...]",
        f"presets: {', '.join(_preset_names(presets))}",
    ]
    own = [*schema.options(extra), *schema.options(Common)]
    rows = [(f"--{one.path}", one.text) for one in own]
    parts.append("\n".join(["flags:", *_two_columns(rows, width)]))
    kinds = {field.name: type(getattr(config, field.name)) for field in dataclasses.fields(config)}
    groups: dict[str, list[tuple[str, str]]] = {}
    for one in schema.options(Config):
        group, _, _ = one.path.rpartition(".")
        value: Any = config
        for name in one.path.split("."):
            value = getattr(value, name)
        if one.path == "network.token" and value is not None:
            value = "(hidden)"
        takes = "" if one.expects == "a text" else f"; {one.expects}"
        row = (f"--config.{one.path}={_as_text(value)}", f"{one.text}{takes}")
        groups.setdefault(group, []).append(row)
    for group, rows in groups.items():
        kind = _HOSTS.get(group.removesuffix(".defaults")) or kinds.get(group, Config)
        about = (kind.__doc__ or "").strip().splitlines()[0]
        parts.append("\n".join([f"{group or 'run'}: {about}", *_two_columns(rows, width)]))
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


def _pairs(arguments: list[str], known: dict[str, Option]) -> Iterable[tuple[str, str]]:
    """Yields the flags as (name, text), whichever of absl's spellings they have."""
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        found = re.fullmatch(r"--?([A-Za-z][\w.-]*)(?:=(.*))?", argument, re.DOTALL)
        if found is None:
            raise ConfigError(f"{argument!r} is no flag: flags look like --config.epochs=3")
        name, text = found[1], found[2]
        if name in ("h", "helpfull", "helpshort"):
            name = "help"
        negated = known.get(name.removeprefix("no")) if name not in known else None
        if text is None and negated is not None and negated.types == (bool,):
            name, text = name.removeprefix("no"), "false"
        one = known.get(name)
        if one is None and not _HOST.fullmatch(name.removeprefix("config.")):
            near = schema.did_you_mean(f"--{name}", [f"--{path}" for path in known])
            raise ConfigError(f"--{name} is not a flag{near} (all of them: --help)")
        if text is None:
            if one is not None and one.types == (bool,):
                text = "true"
            elif rest and not rest[0].startswith("--"):
                text = rest.pop(0)
            else:
                raise ConfigError(f"--{name} lacks its value: write --{name}=VALUE")
        yield name, text


def _find_host(name: str) -> Option:
    """Returns the option that ``config.devices.1.link`` or ``config.nodes.1.link`` names."""
    path = name.removeprefix("config.")
    found = _HOST.fullmatch(path)
    assert found is not None, name
    own = {one.path: one for one in schema.options(_HOSTS[found[1]])}
    if found[3] not in own:
        near = schema.did_you_mean(found[3], own)
        raise ConfigError(
            f"--{name} is not a flag of a {found[1].removesuffix('s')}{near} (all of them: --help)"
        )
    return own[found[3]]._replace(path=path)


def _apply(config: Config, changes: dict[str, tuple[Option, str]]) -> Config:
    plain = []
    for path, (one, text) in changes.items():
        if (found := _HOST.fullmatch(path)) is not None:
            fields = getattr(config, found[1]).overrides.setdefault(int(found[2]), {})
            fields[found[3]] = schema.parse(one, text)
        elif one.types in _PLAIN:
            plain.append(f"--config.{path}={_as_text(schema.parse(one, text))}")
        else:
            holder: Any = config
            *groups, name = path.split(".")
            for group in groups:
                holder = getattr(holder, group)
            setattr(holder, name, schema.parse(one, text))
    # Flags of its own for each call: nothing is left in absl's global ones.
    values = absl_flags.FlagValues()  # type: ignore[no-untyped-call]
    flag = config_flags.DEFINE_config_dataclass(
        "config", config, flag_values=values, sys_argv=["", *plain]
    )
    values(["", *plain])
    made: Config = flag.value
    return made


def _preset_names(presets: pathlib.Path) -> list[str]:
    return sorted(path.stem for path in presets.glob("*.py") if not path.stem.startswith("_"))


def _as_text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) or value is None else str(value)


def _two_columns(rows: list[tuple[str, str]], width: int) -> list[str]:
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
