"""Methods as values: what each says of itself is what its plan is, and nobody below knows one."""

from __future__ import annotations

import ast

import pytest

from pipar_jax.config import AUTO, Config, Hosts, schema
from pipar_jax.config.run_fields import SELECTIONS
from pipar_jax.errors import ConfigError
from pipar_jax.methods.names import NAMES
from pipar_jax.methods.registry import METHODS, hosts_of, plan_for, server_methods, title
from pipar_jax.methods.resolution import resolve
from pipar_jax.schedule.plan import OWNER, is_node
from stages.names import UNITS
from tests.sources import modules

UNIT_NAMES = UNITS["vgg5"]


def config_for(name: str) -> Config:
    """Returns a configuration that a method takes, with two nodes where it uses some."""
    method = METHODS[name]
    made = Config(method=name)
    made.devices.count = 1 if method.one_device else 3
    if method.uses_nodes:
        made.nodes.count = 2
        made.pipeline.cuts = "1,2,3" if method.keeps_labels(made.pipeline) else "1,2"
    return made


@pytest.mark.parametrize("name", METHODS)
def test_a_method_says_what_its_plan_is(name: str) -> None:
    method, config = METHODS[name], config_for(name)
    plan = plan_for(resolve(config), UNIT_NAMES)
    (device, *_) = plan.devices
    assert method.name == name and title(name) == method.title
    assert len(plan.devices) == config.devices.count
    assert plan.order == method.order
    assert bool(device.cuts) == method.cuts
    assert (device.micro_batches > 1) == method.pipelined
    assert any(map(is_node, device.hosts)) == method.uses_nodes
    assert (device.stages > 1 and device.hosts[-1] == OWNER) == method.keeps_labels(config.pipeline)
    made = {"order": plan.order, "cuts": bool(device.cuts), "micro_batches": device.micro_batches}
    assert method.makes(**made) == (name in server_methods())


@pytest.mark.parametrize("name", METHODS)
def test_a_method_has_the_hosts_that_it_uses_and_no_more(name: str) -> None:
    config = config_for(name)
    config.nodes.count = max(config.nodes.count, 2)
    used = hosts_of(resolve(config)).nodes
    assert bool(used) == METHODS[name].uses_nodes
    assert set(used) <= set(Hosts(config, nodes=config.nodes.count).nodes)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_refuses_what_is_for_others(name: str) -> None:
    method, config = METHODS[name], config_for(name)
    if method.uses_nodes:
        config.nodes.count = 0
    else:
        config.pipeline.cuts = "1,2"
    with pytest.raises(ConfigError, match=r"nodes\.count=0|pipeline\.cuts="):
        resolve(config)
    many = config_for(name)
    many.devices.count = 2
    if method.one_device:
        with pytest.raises(ConfigError, match=f"method={name} trains the data of one device"):
            resolve(many)
    else:
        resolve(many)


def test_plans_between_devices_and_server_belong_to_one_method_each() -> None:
    for order in ("parallel", "sequential"):
        for cuts, number in ((False, 1), (True, 1), (True, 4)):
            makers = [
                name
                for name, method in METHODS.items()
                if method.makes(order=order, cuts=cuts, micro_batches=number)
            ]
            assert len(makers) <= 1
            if order == "parallel":
                assert makers


@pytest.mark.parametrize("path", NAMES)
def test_a_field_takes_the_names_that_are_registered_and_tells_them(path: str) -> None:
    (field,) = [one for one in schema.options(Config, names=NAMES) if one.path == path]
    shown = f"{field.text} {field.expects}"
    assert all(name in shown for name in NAMES[path])
    group, _, name = path.rpartition(".")
    config = Config()
    setattr(getattr(config, group) if group else config, name, "nosuchname")
    with pytest.raises(ConfigError, match=f"(?s){path}='nosuchname'.*{NAMES[path][0]}"):
        resolve(config)


def test_the_configuration_knows_nothing_registered_by_name() -> None:
    """But for defaults, which are values like any other."""
    names = {name for known in NAMES.values() for name in known} - {AUTO, *SELECTIONS}
    found = []
    for module, path in modules().items():
        if not module.startswith("pipar_jax.config."):
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        defaults = {
            node.args[0]
            for node in ast.walk(tree)
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "option" and node.args
        }
        found += [
            f"{path}:{node.lineno}: {node.value!r}"
            for node in ast.walk(tree)
            if isinstance(node, ast.Constant) and node.value in names and node not in defaults
        ]
    assert not found, "\n".join(found)
