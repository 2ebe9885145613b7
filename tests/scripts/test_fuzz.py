"""Nonsense on every command line: each value of every entry point's configuration is replaced by invalid ones.

A script must either accept the value (and would start its work, which is replaced here) or raise UsageError with one
line, before anything is written.
"""

import io
import os
import re
import runpy
import shutil
import sys
import zlib
from collections.abc import Iterator
from contextlib import redirect_stderr
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from tests.scripts.conftest import ROOT, skip_mode
from tests.training.configurations import compose_photo_run, compose_run
from tests.training.trees import write_imagefolder
from training.config import compose, flatten
from training.loop import run
from training.settings import parse_run

NONSENSE = [
    *("null", "abc", "-1", "0", "1.5", "1e99", "nan", "inf", "true", "[]", "[a]", "{}", "{a:1}", "''", "' '", "../x"),
    *("99999999999999999999", "'a=b'", "a\\,b", "${seed}", "${nope}", "???"),
]
"""Values as on a command line; each is invalid for most options."""
IMAGES = [
    "data=imagefolder",
    "data.root=photos",
    "data.title=t",
    "data.size=32",
    "data.crop=32",
    "trainer.batch_size=4",
]
ONE_ROW = 'table.rows=[{name: LeNet-5 plain, overrides: ["model=lenet"]}]'
COMMANDS = {
    "train": ["train", "arrangement=mosaic"],
    "train with W&B": ["train", "model=lenet", "logger=wandb", "optim=sgd"],
    "train on images": ["train", "model=ana_four_layer", "arrangement.conv1=G50% P50%", *IMAGES],
    "train a network of a library": ["train", "model=ana_resnet18", "arrangement=exp1", *IMAGES],
    "train on two devices": ["train", "model=lenet", "trainer=ddp"],
    "reproduce_table": ["reproduce_table", "table=digits", ONE_ROW],
    "reproduce_table with a search": [
        *("reproduce_table", "table=fashion_mnist", "data=digits", "table.seeds=[0]"),
        ONE_ROW,
    ],
    "measure": ["measure", "table=digits", "measurement=shapley"],
    **{name: [name] for name in ("claims", "collect", "mosaic", "upload_runs")},
    **{name: [name, "run=finished"] for name in ("evaluate", "explain", "export")},
    "predict": ["predict", "run=color", "images=photos"],
    "approximate": ["approximate", "source=kernels.npy"],
    "compare_approximations": [
        "compare_approximations",
        'overrides=["data=digits","model=lenet"]',
        "layer=conv2",
        "features=conv2",
    ],
    "wandb_workspace": ["wandb_workspace", "entity=me"],
}
WORK = (
    "acl.fit_kernels",
    "acl.explain.attribute",
    "acl.explain.leave_one_out",
    "acl.plot.mosaic",
    "pandas.json_normalize",
    "evaluation.finished_run.prepare_run",
    "evaluation.run_page.render_run_page",
    "reporting.table.run",
    "torch.onnx.export",
    "reporting.claims.collect_effects",
    "reporting.table.Table.find_finished_runs",
    "training.loggers.log_recorded_run",
    "lightning_fabric.Fabric.launch",
    "wandb.login",
)
"""What the scripts call once they have accepted their configuration."""


class Accepted(BaseException):  # the scripts catch Exception
    """Raised in place of the work that a script would do."""


def list_cases(script: str, overrides: list[str]) -> list[str]:
    """An override for every option and every section of a script's configuration, with every nonsensical value."""
    values = OmegaConf.to_container(compose(overrides, script), resolve=False)
    assert isinstance(values, dict)
    options = set(flatten(values))
    sections = {option.rpartition(".")[0] for option in options} - {""}
    unknown = {f"+{section}.unknown" for section in sections} | {"+unknown"}
    return [f"{key}={value}" for key in sorted(options | sections | unknown) for value in NONSENSE]


def select(cases: list[str], fraction: float) -> list[str]:
    """Selects cases by their hash, so that a new option does not change which of the others run; at least three."""
    by_hash = sorted(cases, key=lambda case: zlib.crc32(case.encode()))
    limit = fraction * 2**32
    return [case for i, case in enumerate(by_hash) if i < 3 or zlib.crc32(case.encode()) < limit]


def call(script: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> tuple[bool, str]:
    """Runs a script in this process until its work starts; returns whether it does, and otherwise the error."""
    GlobalHydra.instance().clear()
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    skip_mode(monkeypatch)
    errors = io.StringIO()
    with redirect_stderr(errors):
        try:
            runpy.run_path(str(ROOT / "scripts" / f"{script}.py"), run_name="__main__")
        except Accepted:
            return True, ""
        except SystemExit as error:
            return False, f"status {error.code}: {errors.getvalue()}"
        except Exception as error:
            return False, repr(error)
    return True, ""


@pytest.fixture
def environment() -> Iterator[None]:
    """Removes the variables that scripts add: with the port of ``trainer=ddp``, no other process could use ddp."""
    names = set(os.environ)
    yield
    for name in os.environ.keys() - names:
        del os.environ[name]


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    cfg = compose_run(tmp_path_factory.mktemp("runs"), "trainer.epochs=1", "trainer.batch_size=600")
    run(parse_run(cfg))
    return parse_run(cfg).directory.path


@pytest.fixture(scope="module")
def finished_color_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("color")
    cfg = compose_photo_run(folder, write_imagefolder(folder / "photos", train=4, val=1, test=1))
    run(parse_run(cfg))
    return parse_run(cfg).directory.path


@pytest.fixture
def folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, environment: None, finished_run: Path, finished_color_run: Path
) -> Path:
    """The current folder of the scripts, with all the files that they need."""
    import numpy as np

    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished_run, tmp_path / "runs/finished")
    shutil.copytree(finished_color_run, tmp_path / "runs/color")
    write_imagefolder(tmp_path / "photos", train=4, val=1, test=1)
    np.save(tmp_path / "kernels.npy", np.ones((2, 1, 3, 3)))

    def start_work(*_args: object, **_options: object) -> None:
        raise Accepted

    for target in WORK:
        monkeypatch.setattr(target, start_work)
    return tmp_path


def check(command: str, fraction: float, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script, *overrides = COMMANDS[command]
    assert call(script, overrides, monkeypatch) == (True, "")
    cases = list_cases(script, overrides)
    accepted, failures = [], []
    for case in select(cases, fraction):
        files = set(folder.rglob("*"))
        is_accepted, error = call(script, [*overrides, case], monkeypatch)
        if is_accepted:
            accepted.append(case)
        elif not re.fullmatch(r"status 2: error: .+\n", error) or set(folder.rglob("*")) != files:
            failures.append(f"{case}: {error}"[:400])
    print(f"{command}: {len(cases)} cases; accepted: {' '.join(accepted)}")
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize("command", COMMANDS)
def test_nonsense_is_refused_in_one_line_before_anything_is_written(
    command: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check(command, 0.005, folder, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_more_nonsense_is_refused_in_one_line_before_anything_is_written(
    command: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check(command, 0.2, folder, monkeypatch)
