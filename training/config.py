"""Configurations: composing them as the command line does, and refusing values that cannot be."""

import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from training.errors import UsageError

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


_CHECKS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "seed": (lambda v: _is_whole(v) and 0 <= v < 2**32, "a whole number from 0 to 2^32 - 1"),
    "data.shift": (lambda v: _is_whole(v) and 0 <= v <= 16, "a whole number of pixels from 0 to 16"),
    "data.flip": (lambda v: isinstance(v, bool), "true or false"),
    "data.size": (lambda v: v is None or (_is_whole(v) and v >= 1), "a whole number of pixels of at least 1"),
    "data.crop": (lambda v: v is None or (_is_whole(v) and v >= 1), "a whole number of pixels of at least 1, or null"),
    "data.min_area": (lambda v: v is None or (_is_number(v) and 0 < v <= 1), "a number above 0 and up to 1"),
    "data.validation": (lambda v: v is None or (_is_number(v) and 0 < v < 1), "a number between 0 and 1"),
    "data.skip_undecodable": (lambda v: v is None or isinstance(v, bool), "true or false"),
    "optim.lr": (lambda v: _is_number(v) and v > 0, "a number above 0"),
    "optim.akp_lr_scale": (lambda v: _is_number(v) and v > 0, "a number above 0"),
    "optim.weight_decay": (lambda v: _is_number(v) and v >= 0, "a number of at least 0"),
    "optim.label_smoothing": (lambda v: _is_number(v) and 0 <= v < 1, "a number from 0 to below 1"),
    "optim.schedule": (lambda v: v in ("onecycle", "cosine"), "onecycle or cosine"),
    "trainer.epochs": (lambda v: _is_whole(v) and v >= 1, "a whole number of at least 1"),
    "trainer.batch_size": (lambda v: _is_whole(v) and v >= 1, "a whole number of at least 1"),
    "trainer.devices": (lambda v: _is_whole(v) and v >= 1, "a whole number of at least 1"),
    "trainer.nodes": (lambda v: _is_whole(v) and v >= 1, "a whole number of at least 1"),
    "trainer.checkpoint_minutes": (lambda v: _is_number(v) and v > 0, "a number above 0"),
    "trainer.deterministic": (lambda v: isinstance(v, bool), "true or false"),
    "trainer.compile": (lambda v: isinstance(v, bool), "true or false"),
    "trainer.channels_last": (lambda v: isinstance(v, bool), "true or false"),
    "trainer.test": (lambda v: isinstance(v, bool), "true or false"),
}


def check(cfg: DictConfig) -> None:
    """Raises UsageError for the first value of a run's configuration that cannot be."""
    for key, (valid, wanted) in _CHECKS.items():
        value = OmegaConf.select(cfg, key)
        if not valid(value):
            raise UsageError(f"{key}={value} is not {wanted}")
    if cfg.data.get("crop") and cfg.data.crop > cfg.data.size:
        raise UsageError(f"data.crop={cfg.data.crop} is more than data.size={cfg.data.size}, what there is of an image")


def open_keys(overrides: list[str], roots: tuple[str, ...] = ("arrangement",)) -> list[str]:
    """Lets overrides below ``roots`` name keys that the configuration does not have yet.

    Layers are named by the user, so ``arrangement.<layer>=`` may name one that no configuration has.
    """
    return [f"++{word}" if word.startswith(tuple(f"{root}." for root in roots)) else word for word in overrides]


def compose(overrides: list[str], config: str = "train") -> DictConfig:
    """The configuration that a command line with these overrides gives.

    Raises:
        UsageError: an override that does not fit.
    """
    outer = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
            return hydra.compose(config, open_keys(overrides))
    except (HydraException, OmegaConfBaseException) as error:
        raise UsageError(one_line(error)) from error
    finally:
        GlobalHydra.instance().clear()
        if outer is not None:
            GlobalHydra.instance().initialize(outer)


def one_line(error: BaseException) -> str:
    """A configuration error in one line."""
    if isinstance(error, MissingConfigException) and error.options is not None and error.missing_cfg_file:
        group, _, name = str(error.missing_cfg_file).rpartition("/")
        return f"unknown {group} '{name}'; known: {', '.join(error.options)}"
    causes = [error]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    return ": ".join(dict.fromkeys(" ".join(str(cause).split()) for cause in causes))


def entry(
    task: Callable[[DictConfig], None], config: str = "train", open_roots: tuple[str, ...] = ("arrangement",)
) -> None:
    """Runs a script's task under Hydra. What a user can mend is one line on stderr and exit status 2."""
    asked = os.environ.get("HYDRA_FULL_ERROR") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra else prints errors its own way and exits with 1
    sys.argv[1:] = open_keys(sys.argv[1:], open_roots)

    @functools.wraps(task)
    def job(cfg: DictConfig) -> None:
        try:
            task(cfg)
        except (UsageError, OmegaConfBaseException) as error:
            # Hydra names the failing job in a line of its own: right in a sweep, noise for a single run.
            if asked or HydraConfig.get().mode == RunMode.MULTIRUN:
                raise
            _refuse(error)

    try:
        hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name=config)(job)()
    except (UsageError, HydraException, OmegaConfBaseException) as error:
        if asked:
            raise
        _refuse(error)
    except KeyboardInterrupt:
        print("interrupted; what is recorded is kept", file=sys.stderr)
        sys.exit(130)


def _refuse(error: Exception) -> NoReturn:
    print(f"error: {error if isinstance(error, UsageError) else one_line(error)}", file=sys.stderr)
    sys.exit(2)
