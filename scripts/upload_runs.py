"""Sends finished runs to Weights & Biases: python scripts/upload_runs.py runs=runs logger.project=anann"""

import sys
from typing import Any

from tqdm import tqdm

from evaluation.finished_run import find_finished_runs, read_run_folder
from training.cli import run_script
from training.errors import UsageError
from training.loggers import LoggerSettings, check_logger, log_recorded_run
from training.validation import construct, strict_dataclass


@strict_dataclass
class UploadSettings:
    runs: str | list[str]
    logger: dict[str, Any]


def main(settings: UploadSettings) -> None:
    logger = construct(LoggerSettings, settings.logger, "logger")
    paths = find_finished_runs(settings.runs)
    check_logger(logger)
    num_uploaded = 0
    for path in tqdm(paths, unit="run", disable=None):
        try:
            run, record = read_run_folder(path)
            log_recorded_run(logger, run.directory, run.config, record)
            num_uploaded += 1
        except UsageError as error:
            print(f"skipped: {error}", file=sys.stderr)
    if not num_uploaded:
        raise UsageError("no run could be read")
    print(f"{num_uploaded} runs logged to W&B project {logger.project}")


if __name__ == "__main__":
    run_script(main, "upload_runs", UploadSettings)
