"""Measures the trained networks of a table: python scripts/measure.py table=digits measurement=shapley

Adds a line per run to results/evidence/<table>_<measurement>.jsonl. Runs that have a line are not measured again.
"""

import json

from omegaconf import DictConfig
from pydantic.dataclasses import dataclass as validated_dataclass
from tqdm import tqdm

from reporting.json_lines import to_json_lines
from reporting.measurements import MEASUREMENTS, read_measurements
from reporting.table import open_table
from training.config import resolve, run_script
from training.errors import UsageError
from training.finished_run import DataLocation, build_run_fabric, load_data_as_trained, load_finished_run
from training.provenance import describe_environment
from training.run_directory import write_atomic
from training.validation import STRICT, construct


@validated_dataclass(frozen=True, kw_only=True, config=STRICT)
class MeasureOptions:
    """The options of configs/measure.yaml itself."""

    measurement: str
    only: list[str] | None


def main(cfg: DictConfig) -> None:
    options = construct(MeasureOptions, {name: resolve(cfg)[name] for name in ("measurement", "only")})
    if options.measurement not in MEASUREMENTS:
        raise UsageError(f"measurement={options.measurement} is invalid; known: {', '.join(MEASUREMENTS)}")
    table = open_table(cfg, "worker", "measurement", "only")
    names = [row.name for row in table.rows]
    wanted = names if options.only is None else options.only
    if unknown := [name for name in wanted if name not in names]:
        raise UsageError(f"only has '{unknown[0]}', which is not a row of table {table.name}; its rows: {names}")
    runs = [(row, planned) for row, planned in table.find_finished_runs() if row in wanted]
    if not runs:
        raise UsageError(f"table {table.name} has no finished run in these rows; run scripts/reproduce_table.py first")
    file = table.path.parents[1] / "evidence" / f"{table.name}_{options.measurement}.jsonl"
    lines = read_measurements(file) if file.exists() else []
    known = {line["id"] for line in lines}
    for row, planned in tqdm(runs, desc=options.measurement, unit="run", disable=None):
        if planned.directory.id in known:
            continue
        data = planned.cfg.data
        run = load_finished_run(planned.directory.path, DataLocation(root=data.root, cache=data.get("cache")))
        values = MEASUREMENTS[options.measurement](run, load_data_as_trained(run))
        run_key = {"row": row, "id": planned.directory.id, "seed": run.settings.seed}
        lines.append({**run_key, "values": values, **describe_environment(build_run_fabric(run).device)})
        write_atomic(file, to_json_lines(lines))
        tqdm.write(f"{row}, seed {run.settings.seed}: {json.dumps(values)}")
    print(file)


if __name__ == "__main__":
    run_script(main, "measure", new_key_roots=("arrangement", "data", "model", "optim", "trainer", "logger"))
