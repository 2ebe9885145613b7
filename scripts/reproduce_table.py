"""Performs the runs of a table and writes it: python scripts/reproduce_table.py table=mnist data.root=/data

With --status, it only lists which runs are done, running, failed or left to do. With --render, it rewrites the table
from the records in its own .jsonl file. With --verify, it performs all runs again, in <paths.runs>/verify, and compares
them with the records in that file; the exit status is 1 unless every row is reproduced or consistent.
"""

import sys
from pathlib import Path

from omegaconf import DictConfig

from reporting.table import RUN_KEY_ROOTS, open_table
from reporting.verification import verify_table
from training.cli import run_script
from training.errors import UsageError

FLAGS = {flag for flag in ("--status", "--render", "--verify") if flag in sys.argv}
sys.argv[1:] = [argument for argument in sys.argv[1:] if argument not in FLAGS]


def main(cfg: DictConfig) -> None:
    if len(FLAGS) > 1:
        raise UsageError(f"{' and '.join(sorted(FLAGS))} cannot be combined")
    if FLAGS and cfg.debug is not None:
        raise UsageError(f"debug={cfg.debug} records nothing, so {', '.join(FLAGS)} has nothing to work on")
    table = open_table(cfg)
    if "--verify" in FLAGS:
        comparisons = verify_table(table, Path(cfg.paths.runs).expanduser() / "verify")
        print(f"\n{table.name}, compared with {table.path.with_suffix('.jsonl')}:")
        for comparison in comparisons:
            print(f"  {comparison.row}: {', '.join(filter(None, (comparison.outcome, comparison.details)))}")
        sys.exit(0 if all(comparison.is_confirmed for comparison in comparisons) else 1)
    if "--status" in FLAGS:
        status = table.status()
        print(f"{table.name}: " + ", ".join(f"{len(titles)} {state}" for state, titles in status.items()))
        for state in ("running", "failed"):
            for title in status[state]:
                print(f"  {state}: {title}")
    elif "--render" in FLAGS:
        table.check_written()
        table.load_results()
        table.write()
        print(table.path.with_suffix(".md"))
    else:
        if cfg.debug is None:
            table.check_written()
        table.reproduce()
        if cfg.debug is not None:
            print(f"{table.name}: each row trains and evaluates; nothing was recorded")
            return
        print(f"\n{table.path.with_suffix('.md').read_text('utf-8')}")
    if outdated := table.describe_outdated():
        print(f"{outdated}; fresh=true reruns them")


if __name__ == "__main__":
    run_script(main, "reproduce_table", new_key_roots=RUN_KEY_ROOTS)
