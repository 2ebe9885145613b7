"""Measures the trained networks of a table: python scripts/measure.py table=digits measurement=shapley

Adds a line per run to results/evidence/<table>_<measurement>.jsonl. Runs that have a line are measured again only if
their weights have changed since; the line is then replaced. Any number of processes may write to one file.
"""

import json
from pathlib import Path

from omegaconf import DictConfig
from tqdm import tqdm

from evaluation.finished_run import DataLocation, build_run_fabric, load_data_as_trained, load_finished_run
from evaluation.measurements import MEASUREMENTS, Measurement, is_current, read_measurements, write_measurement
from reporting.table import RUN_KEY_ROOTS, open_table
from training.cli import run_script
from training.config import resolve
from training.errors import UsageError
from training.provenance import describe_environment, digest_file
from training.record import read_record
from training.validation import construct, strict_dataclass


@strict_dataclass
class MeasureOptions:
    """The options of configs/measure.yaml itself."""

    measurement: str
    only: list[str] | None


def main(cfg: DictConfig) -> None:
    options = construct(MeasureOptions, {name: resolve(cfg)[name] for name in ("measurement", "only")})
    measurement = MEASUREMENTS.get(options.measurement)
    if measurement is None:
        raise UsageError(f"measurement={options.measurement} is invalid; known: {', '.join(MEASUREMENTS)}")
    table = open_table(cfg, "measurement", "only")
    names = [row.name for row in table.rows]
    wanted = names if options.only is None else options.only
    if unknown := [name for name in wanted if name not in names]:
        raise UsageError(f"only has '{unknown[0]}', which is not a row of table {table.name}; its rows: {names}")
    runs = [(row, planned) for row, planned in table.find_finished_runs() if row in wanted]
    if not runs:
        raise UsageError(f"table {table.name} has no finished run in these rows; run scripts/reproduce_table.py first")
    file = table.path.parents[1] / "evidence" / f"{table.name}_{options.measurement}.jsonl"
    check_written(file, measurement, {(row, planned.settings.seed): planned.directory.id for row, planned in runs})
    for row, planned in tqdm(runs, desc=measurement.name, unit="run", disable=None):
        data, path, seed = planned.settings.data, planned.directory.path, planned.settings.seed
        lines = read_measurements(file, measurement)  # another process may have added some
        record = read_record(planned.directory.record_file)
        if any((line.row, line.seed) == (row, seed) and is_current(line, record, path) for line in lines):
            continue
        digests = {"weights": digest_file(path / "model.safetensors")}
        if measurement.uses_akp_history:
            digests["akps"] = digest_file(path / "akps.safetensors")
        run = load_finished_run(path, DataLocation(root=data["root"], cache=data.get("cache")))
        values = measurement.measure(run, load_data_as_trained(run))
        key = {"row": row, "id": record.id, "seed": seed, "values": values}
        environment = describe_environment(build_run_fabric(run).device)
        line = construct(measurement.make_line_type(), {**key, **digests, **environment})
        write_measurement(file, measurement, line)
        tqdm.write(f"{row}, seed {seed}: {json.dumps(values)}")
    print(file)


def check_written(file: Path, measurement: type[Measurement], ids: dict[tuple[str, int], str]) -> None:
    """Raises UsageError if lines of a file would be replaced by those of runs of another recipe, by row and seed."""
    for line in read_measurements(file, measurement):
        if line.id != ids.get((line.row, line.seed), line.id):
            raise UsageError(
                f"{file} has row '{line.row}', seed {line.seed}, of another recipe; move it away, or write elsewhere "
                "with paths.results=<folder>"
            )


if __name__ == "__main__":
    run_script(main, "measure", new_key_roots=RUN_KEY_ROOTS)
