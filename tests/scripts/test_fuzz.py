"""Nonsense on every command line: each value of every entry point's configuration is replaced by invalid ones.

A script must either accept the value (and would start its work, which is replaced here) or raise UsageError with one
line, before anything is written.
"""

import random
import runpy
import sys
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from tests.scripts.conftest import ROOT
from tests.training.configurations import compose_run
from tests.training.trees import write_imagefolder
from training.config import compose, flatten
from training.loop import run
from training.runs import open_run_directory

NONSENSE = [
    *("null", "abc", "-1", "0", "1.5", "1e99", "nan", "inf", "true", "[]", "[a]", "{}", "{a:1}", "''", "' '", "../x"),
    *("99999999999999999999", "'a=b'", "a\\,b", "${seed}", "${nope}", "???"),
]
"""Values as on a command line; each is invalid for most options."""
IMAGES = ["data=imagefolder", "data.root=photos", "data.title=t", "data.size=32", "data.crop=32"]
COMMANDS = {
    "train": ["train", "arrangement=mosaic"],
    "train with W&B": ["train", "model=lenet", "logger=wandb", "optim=sgd"],
    "train on images": ["train", "model=ana_four_layer", "arrangement.conv1=G50% P50%", *IMAGES],
    "train a network of a library": ["train", "model=ana_resnet18", "arrangement=exp1", *IMAGES],
    "train on two devices": ["train", "model=lenet", "trainer=ddp"],
    "reproduce_table": ["reproduce_table", "table=digits"],
    "reproduce_table with a search": ["reproduce_table", "table=fashion_mnist", "data=digits"],
    **{name: [name] for name in ("collect", "mosaic", "upload_runs")},
    **{name: [name, "run=finished"] for name in ("evaluate", "explain", "export")},
    "approximate": ["approximate", "source=kernels.npy"],
    "wandb_workspace": ["wandb_workspace", "entity=me"],
}
WORK = (
    "acl.fit_kernels",
    "acl.plot.mosaic",
    "pandas.json_normalize",
    "reporting.run_page.render_run_page",
    "reporting.table.Table.reproduce",
    "torch.onnx.export",
    "training.evaluate.evaluate",
    "training.loggers.log_recorded_run",
    "training.loop.train",
    "wandb.login",
)
"""What the scripts call once they have accepted their configuration."""


class AcceptedError(Exception):
    """Raised in place of the work that a script would do."""


def list_cases(script: str, overrides: list[str]) -> list[str]:
    """An override for every option and every section of a script's configuration, with every nonsensical value."""
    values = OmegaConf.to_container(compose(overrides, script), resolve=False)
    assert isinstance(values, dict)
    options = set(flatten(values))
    sections = {option.rpartition(".")[0] for option in options} - {""}
    unknown = {f"+{section}.unknown" for section in sections} | {"+unknown"}
    return [f"{key}={value}" for key in sorted(options | sections | unknown) for value in NONSENSE]


def call(script: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int | str | None:
    """Runs a script in this process until its work starts; returns its exit status, or None if it was accepted."""
    GlobalHydra.instance().clear()
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    try:
        runpy.run_path(str(ROOT / "scripts" / f"{script}.py"), run_name="__main__")
    except AcceptedError:
        return None
    except SystemExit as error:
        return error.code
    return None


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder of the scripts, with all the files that they need."""
    import numpy as np

    monkeypatch.chdir(tmp_path)
    cfg = compose_run(tmp_path / "runs", "trainer.epochs=1", "trainer.batch_size=600")
    run(cfg)
    open_run_directory(cfg).path.rename(tmp_path / "runs/finished")
    write_imagefolder(tmp_path / "photos", train=4, val=1, test=1)
    np.save(tmp_path / "kernels.npy", np.ones((2, 1, 3, 3)))

    def start_work(*_args: object, **_options: object) -> None:
        raise AcceptedError

    for target in WORK:
        monkeypatch.setattr(target, start_work)
    return tmp_path


def check(command: str, fraction: float, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: object) -> None:
    script, *overrides = COMMANDS[command]
    cases = list_cases(script, overrides)
    assert call(script, overrides, monkeypatch) is None, capsys.readouterr().err  # type: ignore[attr-defined]
    files = set(folder.rglob("*"))
    failures = []
    accepted = []
    for case in random.Random(0).sample(cases, round(fraction * len(cases))):
        try:
            status = call(script, [*overrides, case], monkeypatch)
        except Exception as error:
            failures.append(f"{case}: {type(error).__name__}: {error}"[:300])
            continue
        errors = capsys.readouterr().err  # type: ignore[attr-defined]
        if status is None:
            accepted.append(case)
            files = set(folder.rglob("*"))
            continue
        if status != 2 or not errors.startswith("error: ") or errors.count("\n") != 1:
            failures.append(f"{case}: status {status}, {errors!r}"[:300])
        written = set(folder.rglob("*")) - files
        if written:
            failures.append(f"{case}: wrote {written}"[:300])
        files |= written
    print(f"{command}: {len(cases)} cases, accepted: {accepted}")
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize("command", COMMANDS)
def test_nonsense_is_refused_in_one_line_before_anything_is_written(
    command: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    check(command, 0.02, folder, monkeypatch, capsys)


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_all_nonsense_is_refused_in_one_line_before_anything_is_written(
    command: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    check(command, 1, folder, monkeypatch, capsys)
