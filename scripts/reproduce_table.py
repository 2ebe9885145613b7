"""Does a table's runs and writes it: python scripts/reproduce_table.py table=mnist data.root=/data

With --status it only says which runs are done, running, failed and left.
"""

import sys

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from training.config import entry
from training.tables import Table

STATUS = "--status" in sys.argv
if STATUS:
    sys.argv.remove("--status")


def main(cfg: DictConfig) -> None:
    hydra = HydraConfig.get()
    own = ("table", "worker")  # the rest is the runs'
    overrides = [word for word in hydra.overrides.task if word.lstrip("+").split("=")[0].split(".")[0] not in own]
    table = Table(hydra.runtime.choices["table"], cfg.table, overrides)
    if STATUS:
        status = table.status()
        print(f"{table.name}: " + ", ".join(f"{len(titles)} {state}" for state, titles in status.items()))
        for state in ("running", "failed"):
            for title in status[state]:
                print(f"  {state}: {title}")
        return
    table.reproduce()
    print(f"\n{(table.results / table.name).with_suffix('.md').read_text()}")


if __name__ == "__main__":
    entry(main, "reproduce_table")
