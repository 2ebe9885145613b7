"""Does a table's runs and writes it: python scripts/reproduce_table.py table=mnist data.root=/data"""

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from training.config import entry
from training.tables import Table


def main(cfg: DictConfig) -> None:
    hydra = HydraConfig.get()
    overrides = [word for word in hydra.overrides.task if not word.lstrip("+").startswith("table")]
    table = Table(hydra.runtime.choices["table"], cfg.table, overrides)
    table.reproduce()
    print(f"\n{(table.results / table.name).with_suffix('.md').read_text()}")


if __name__ == "__main__":
    entry(main, "reproduce_table")
