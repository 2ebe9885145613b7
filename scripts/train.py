"""Trains and tests one network: python scripts/train.py model=ana_lenet arrangement=mosaic data=mnist seed=3"""

import os

from lightning_fabric.utilities.rank_zero import rank_zero_only
from omegaconf import DictConfig

from training.cli import run_script
from training.loggers import log_recorded_run
from training.loop import run
from training.settings import find_changes, parse_run


def main(cfg: DictConfig) -> float:
    """Returns the validation accuracy in percent, which a Hydra sweeper maximizes."""
    settings = parse_run(cfg)
    record, is_new = run(settings)
    if cfg.debug is not None:
        rank_zero_only(print)("the network trains and evaluates; nothing was recorded")
        return record.val.top1
    if not is_new and "WANDB_SWEEP_ID" in os.environ:  # the sweep needs the result of every run that it proposes
        log_recorded_run(settings.logger, settings.directory, settings.config, record)
    result = f"validation {record.val.top1:.2f}%"
    if record.test is not None:
        result = f"test {record.test.top1:.2f}%, {result}"
    note = "" if is_new else " (recorded before)"
    if not is_new and (changes := find_changes(settings, record)):
        note = f" (recorded before, with other {' and other '.join(changes)}; fresh=true reruns it)"
    rank_zero_only(print)(
        f"{settings.directory.path}{note}: {result} (epoch {record.best_epoch}), "
        f"{record.parameters.conv:,} convolution parameters of {record.parameters.total:,}, {record.seconds:.0f} s"
    )
    return record.val.top1


if __name__ == "__main__":
    run_script(main, "train")
