"""Runs scripts under Hydra."""

import functools
import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from training.config import CONFIGS, NEW_KEY_ROOTS, check_choices, complete_overrides, format_error, resolve
from training.errors import UsageError
from training.validation import construct


def run_script(
    task: Callable[[Any], object],
    config: str,
    settings: Callable[..., Any] | None = None,
    new_key_roots: tuple[str, ...] = NEW_KEY_ROOTS,
) -> None:
    """Runs a script's task under Hydra. An error that the user can fix becomes one line on stderr and exit status 2.

    Args:
        task: takes the configuration, or the ``settings`` built from it; a Hydra sweeper receives what it returns.
        config: the name of the configuration file.
        settings: a validated dataclass of the script's options; None: pass the configuration itself.
        new_key_roots: as for ``complete_overrides``.
    """
    user_wants_traceback = os.environ.get("HYDRA_FULL_ERROR") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # otherwise Hydra formats errors itself and exits with status 1
    sys.argv[1:] = [_quote_run_id(word) for word in complete_overrides(sys.argv[1:], config, new_key_roots)]

    has_started = False

    @functools.wraps(task)
    def job(cfg: DictConfig) -> object:
        nonlocal has_started
        has_started = True
        try:
            return task(cfg if settings is None else construct(settings, resolve(cfg)))
        except (UsageError, OmegaConfBaseException) as error:
            # When an error propagates, Hydra adds a line that names the failing job, which helps only in a sweep.
            if user_wants_traceback or HydraConfig.get().mode == RunMode.MULTIRUN:
                raise
            _exit_with(error)

    try:
        check_choices(sys.argv[1:])
        hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name=config)(job)()
    except KeyboardInterrupt:
        print("interrupted; finished work is kept", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        # Before the task starts, any error comes from the command line: Hydra raises many types for invalid overrides.
        is_expected = not has_started or isinstance(error, UsageError | HydraException | OmegaConfBaseException)
        if user_wants_traceback or not is_expected:
            raise
        _exit_with(error)


def _exit_with(error: Exception) -> NoReturn:
    print(f"error: {format_error(error)}", file=sys.stderr)
    sys.exit(2)


def _quote_run_id(override: str) -> str:
    """Keeps Hydra from reading the id of a run as a number."""
    key, _, value = override.partition("=")
    return f"run='{value}'" if key == "run" and value.isalnum() else override
