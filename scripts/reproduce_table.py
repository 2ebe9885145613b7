"""Does a table's runs and writes it: python scripts/reproduce_table.py table=mnist data.root=/data

With --status it only says which runs are done, running, failed and left.
"""

import re
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
    words = [word.removeprefix("++") for word in hydra.overrides.task]
    overrides = [word for word in words if re.split(r"[.=]", word.lstrip("+"))[0] not in own]
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
    # What a run's configuration has is known once its row is composed: its data set has keys that the default has not.
    entry(main, "reproduce_table", ("arrangement", "data", "model", "optim", "trainer", "logger"))
