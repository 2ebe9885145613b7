"""Every table trains and evaluates each of its rows in ``debug=smoke``, on small data sets in the official layouts."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.scripts.conftest import ROOT, RunScript
from tests.training import trees

TABLES = sorted(file.stem for file in (ROOT / "configs/table").glob("*.yaml"))
WRITERS: dict[str, Callable[[Path], Path]] = {
    "mnist": trees.write_mnist,
    "fashion_mnist": lambda root: trees.write_mnist(root, "FashionMNIST", train=7000),  # 1% is 20 images
    "cifar10": trees.write_cifar10,
    "flowers102": trees.write_flowers102,
    "food101": trees.write_food101,
}


def write_images(root: Path, table: str) -> None:
    """Writes a small data set in the layout that a table reads."""
    suffixes = ("", "_alexnet", "_resnet18", "_few", "_shares", "_kinds", "_robust")
    name = next((name for name in WRITERS if table.removeprefix(name) in suffixes), None)
    if name is None:
        trees.write_imagefolder(root, train=10, test=4)
    else:
        WRITERS[name](root)


@pytest.mark.slow
@pytest.mark.parametrize("table", TABLES)
def test_each_row_trains_and_evaluates(
    table: str, tmp_path: Path, call_script: RunScript, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The checksums are those of the official files.
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda path, md5=None: Path(path).is_file())
    write_images(tmp_path / "data", table)
    monkeypatch.chdir(tmp_path)
    overrides = ["debug=smoke", f"data.root={tmp_path / 'data'}"]
    if table.startswith(("flowers", "food", "imagenette")):  # pretrained weights cannot be downloaded here
        overrides += ["++model.pretrained=false", "++model.random_layers=null", "optim.pretrained_lr_scale=null"]
    done = call_script("reproduce_table.py", f"table={table}", *overrides)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(f"{table}: each row trains and evaluates; nothing was recorded\n")
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
