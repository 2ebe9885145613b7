"""Composes configurations as the command line does, and identifies runs by them."""

import copy
import functools
import os
import re
import shlex
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, MissingMandatoryValue

from training.errors import UsageError

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
OmegaConf.register_new_resolver("expand_home", os.path.expanduser, replace=True)  # a notebook can reload this module
NEW_KEY_ROOTS = ("arrangement",)
"""The sections of a configuration to which overrides may add keys."""

# These options do not change a run's result, so they are not part of its identity.
_NOT_IN_IDENTITY = (
    ("paths",),
    ("logger",),
    ("fresh",),
    ("data", "root"),
    ("data", "cache"),
    ("model", "layer", "compute"),
    *(
        ("trainer", key)
        for key in ("accelerator", "strategy", "devices", "nodes", "deterministic", "compile", "checkpoint_minutes")
    ),
)
# Options added later default to null, and a null option is left out of the identity, so that existing runs keep their
# ids. These options could be null from the start, so they are part of the identity even when null.
_NULL_IN_IDENTITY = (("model", "layer"), ("data", "crop"), ("data", "mean"), ("data", "std"))


def resolve(cfg: DictConfig) -> dict[str, Any]:
    """Converts a configuration to plain values, as written to config.yaml."""
    values = _with_text_keys(OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True))
    assert isinstance(values, dict)
    return values


def _with_text_keys(node: Any) -> Any:
    """Layers can have numbers as names, which JSON turns into text."""
    return {str(key): _with_text_keys(value) for key, value in node.items()} if isinstance(node, dict) else node


def identity(values: dict[str, Any], parent_path: tuple[str, ...] = ()) -> dict[str, Any]:
    """The part of a run's resolved configuration that determines its result."""
    kept = {}
    for key, value in values.items():
        key_path = (*parent_path, key)
        is_ignored_null = value is None and key_path not in _NULL_IN_IDENTITY and key_path[0] != "arrangement"
        if key_path not in _NOT_IN_IDENTITY and not is_ignored_null:
            kept[key] = identity(value, key_path) if isinstance(value, dict) else value
    return kept


def get_key(override: str) -> str:
    """The key that an override such as ``++optim.lr=1e-3`` sets."""
    return override.lstrip("+").partition("=")[0]


def is_in_identity(override: str) -> bool:
    """Whether an override such as ``seed=3`` can change a run's result."""
    key_path = tuple(get_key(override).split("."))
    return not any(key_path[: len(excluded)] == excluded for excluded in _NOT_IN_IDENTITY)


def flatten(node: Any, prefix: str = "") -> dict[str, Any]:
    """Joins nested keys by dots. Layer names contain dots, at which a configuration splits keys into levels."""
    if not isinstance(node, dict):
        return {prefix: node}
    return {
        name: value
        for key, child in node.items()
        for name, value in flatten(child, f"{prefix}.{key}" if prefix else str(key)).items()
    }


def complete_overrides(overrides: list[str], config: str, new_key_roots: tuple[str, ...]) -> list[str]:
    """Completes the overrides of a command line.

    - Overrides under ``new_key_roots`` may add keys to the configuration. For example, ``arrangement.<layer>=`` names a
      layer of the network, which no configuration file lists.
    - The default arrangement of configs/train.yaml is that of the default network: a run that chooses a network, or
      the arrangement of single layers, has no other analytic layers.
    """
    prefixes = tuple(f"{root}." for root in new_key_roots)
    completed = [f"++{override}" if override.startswith(prefixes) else override for override in overrides]
    keys = [get_key(override) for override in overrides]
    choices = [i for i, key in enumerate(keys) if re.match(r"model$|arrangement\.", key)]
    if config == "train" and choices and "arrangement" not in keys:
        completed.insert(choices[0], "arrangement=plain")  # not at the end: Hydra reads no override behind a flag
    return completed


def check_choices(overrides: list[str]) -> None:
    """Raises UsageError for a group that is set to something other than the name of one of its files."""
    for override in overrides:
        group, _, choice = override.partition("=")
        if (CONFIGS / group).is_dir() and group and not isinstance(yaml.safe_load(choice), str):
            names = sorted(file.stem for file in (CONFIGS / group).glob("*.yaml"))
            raise UsageError(f"{override} is invalid: choose one of {', '.join(names)}")


def compose(overrides: list[str], config: str = "train") -> DictConfig:
    """Composes the configuration as a command line with these overrides does; files are read once per process.

    Raises:
        UsageError: for an unknown or invalid override.
    """
    try:
        check_choices(overrides)
        parsed = OverridesParser.create().parse_overrides(complete_overrides(overrides, config, NEW_KEY_ROOTS))
        values = [override for override in parsed if _sets_value(override)]
        choices = [str(override.input_line) for override in parsed if not _sets_value(override)]
        cfg = copy.deepcopy(_compose_files(tuple(choices), config))
        ConfigLoaderImpl._apply_overrides_to_config(values, cfg)  # as Hydra does, but without reading the files again
        return cfg
    except Exception as error:  # Hydra raises errors of many types for invalid overrides
        raise UsageError(format_error(error)) from error


def _sets_value(override: Override) -> bool:
    """Whether an override sets a value and does not choose files, which would take Hydra 0.2 s."""
    group = override.key_or_group
    is_choice = override.package is not None or group.startswith("hydra") or (CONFIGS / group).is_dir()
    return not (is_choice or override.is_sweep_override())


@functools.cache
def _compose_files(choices: tuple[str, ...], config: str) -> DictConfig:
    outer_hydra = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
            return hydra.compose(config, list(choices))
    finally:
        GlobalHydra.instance().clear()
        if outer_hydra is not None:
            GlobalHydra.instance().initialize(outer_hydra)


def format_error(error: BaseException) -> str:
    """Formats an error and its causes in one line."""
    if isinstance(error, UsageError):
        return str(error)
    if isinstance(error, MissingConfigException) and error.options is not None and error.missing_cfg_file:
        group, _, name = str(error.missing_cfg_file).rpartition("/")
        return f"unknown {group} '{name}'; known: {', '.join(error.options)}"
    if isinstance(error, MissingMandatoryValue):
        return f"{error.full_key} is missing"
    if isinstance(unknown := error.__cause__, ConfigAttributeError):
        known = [str(key) for key in unknown.parent_node or () if key != "hydra"]
        return f"unknown option {unknown.full_key}" + (f"; known: {', '.join(known)}" if known else "")
    if isinstance(error, OverrideParseException) and "=" in error.override:
        key, _, value = error.override.partition("=")
        if not re.fullmatch(r"[\w.+~/@:$-]*", key):
            hint = f"no option is named '{key}'"
            if key.lstrip("+").startswith("arrangement."):
                hint = "write such names of layers to configs/arrangement/<name>.yaml, and set arrangement=<name>"
            return f"cannot read {error.override}: {hint}"
        text = '["..."]' if value.startswith("[") else '"' + value.replace('"', '\\"') + '"'
        reason = f" ({' '.join(str(error.__cause__).split())})" if isinstance(error.__cause__, HydraException) else ""
        hint = "put text with special characters in quotes, inside those of the shell"
        return f"cannot read {error.override}{reason}: {hint}: {shlex.quote(f'{key}={text}')}"
    causes = [error]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    return ": ".join(dict.fromkeys(" ".join(str(cause).split()) for cause in causes))
