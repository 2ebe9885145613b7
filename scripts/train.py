"""Trains and tests one network: python scripts/train.py model=ana_lenet arrangement=mosaic data=mnist seed=3"""

from lightning_fabric.utilities.rank_zero import rank_zero_only
from omegaconf import DictConfig

from training.config import entry
from training.loop import run
from training.records import run_folder


def main(cfg: DictConfig) -> None:
    record, here = run(cfg)
    result = f"validation {record['val']['top1']:.2f}%"
    if record["test"] is not None:
        result = f"test {record['test']['top1']:.2f}%, {result}"
    parameters = record["parameters"]
    rank_zero_only(print)(
        f"{run_folder(cfg)}{'' if here else ' (recorded before)'}: {result} (epoch {record['best_epoch']}), "
        f"{parameters['conv']:,} convolution parameters of {parameters['total']:,}, {record['seconds']:.0f} s"
    )


if __name__ == "__main__":
    entry(main)
