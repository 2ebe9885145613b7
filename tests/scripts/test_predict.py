import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from evaluation.finished_run import load_data_as_trained, load_finished_run
from scripts.predict import PredictSettings, main, to_gray
from tests.scripts.conftest import RunScript
from tests.training.configurations import compose_photo_run, compose_run
from tests.training.trees import write_imagefolder
from training.errors import UsageError
from training.loop import run
from training.settings import parse_run


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The folder of a run that was trained on images cropped at their center, and the images."""
    folder = tmp_path_factory.mktemp("predict")
    root = write_imagefolder(folder / "photos", size=50, train=12, val=2, test=4)
    options = ["data.size=36", "data.crop=28", "data.min_area=0.5", "trainer.epochs=8", "optim.lr=0.01"]
    cfg = compose_photo_run(folder, root, *options)
    run(parse_run(cfg))
    return parse_run(cfg).directory.path, root


@pytest.mark.parametrize("name", ["", "model.safetensors"])
def test_predictions_are_those_of_evaluation(
    photos: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    path, root = photos
    file = tmp_path / "predictions.csv"
    main(PredictSettings(run=path / name, images=root / "test", file=file))
    assert capsys.readouterr().out == f"{file}: 12 images\n"
    frame = pd.read_csv(file)
    assert list(frame.columns) == ["image", "prediction", "class_0", "class_1", "class_2"]
    assert frame["image"].tolist() == [str(root / f"test/class_{k}/{i}.png") for k in range(3) for i in range(4)]
    finished = load_finished_run(path)
    data = load_data_as_trained(finished)
    with torch.no_grad():
        (batch,) = data.eval_batches(data.test)
        expected = finished.model(batch.images).softmax(1)
    assert frame.iloc[:, 2:].to_numpy() == pytest.approx(expected.numpy(), abs=2e-6)
    assert frame["prediction"].tolist() == [f"class_{label}" for label in expected.argmax(1)]
    assert finished.record is not None and frame["prediction"].nunique() > 1
    correct = frame["prediction"] == [f"class_{k}" for k in range(3) for _ in range(4)]
    assert 100 * correct.mean() == pytest.approx(finished.record.test.top1)


def test_predictions_for_one_image_are_printed(photos: tuple[Path, Path], call_script: RunScript) -> None:
    path, root = photos
    done = call_script("predict.py", f"run={path}", f"images={root}/test/class_1/0.png")
    header, line, *rest = done.stdout.splitlines()
    assert header == "image,prediction,class_0,class_1,class_2" and not rest, done.stderr
    assert line.startswith(f"{root}/test/class_1/0.png,class_")


def test_undecodable_and_other_files_are_left_out(
    photos: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, root = photos
    shutil.copytree(root / "test", tmp_path / "test")
    (tmp_path / "test/class_0/0.png").write_bytes(b"half")
    (tmp_path / "test/notes.txt").touch()
    main(PredictSettings(run=path, images=tmp_path / "test", file=None))
    output = capsys.readouterr()
    assert len(output.out.splitlines()) == 1 + 11 and "class_0/0.png" not in output.out
    assert "1 without an image extension" in output.err
    assert f"left out 1 images that cannot be decoded: {tmp_path}/test/class_0/0.png" in output.err
    with pytest.raises(UsageError, match=r"images=.*0\.png: no image can be decoded"):
        main(PredictSettings(run=path, images=tmp_path / "test/class_0/0.png", file=None))


@pytest.mark.parametrize("name", ["empty", "missing"])
def test_images_without_image_files_are_refused(photos: tuple[Path, Path], tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        UsageError, match=f"images={tmp_path / name} is invalid: it should be an image file or a folder"
    ):
        main(PredictSettings(run=photos[0], images=tmp_path / name, file=None))


def test_images_are_converted_to_gray_for_network_of_gray_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = compose_run(tmp_path, "trainer.epochs=1", "trainer.batch_size=600")
    run(parse_run(cfg))
    finished = load_finished_run(parse_run(cfg).directory.path)
    data = load_data_as_trained(finished)
    split = data.test[:3]
    for i, image in enumerate(split.images):
        Image.fromarray(image[0].numpy()).convert("L" if i else "RGB").save(tmp_path / f"{i}.png")
    main(PredictSettings(run=finished.path, images=tmp_path, file=tmp_path / "predictions.csv"))
    assert "converted to gray but not inverted; those of digits are light on black" in capsys.readouterr().err
    (batch,) = data.eval_batches(split)
    expected = finished.model(batch.images).softmax(1).detach().numpy()
    assert pd.read_csv(tmp_path / "predictions.csv").iloc[:, 2:].to_numpy() == pytest.approx(expected, abs=2e-6)


def test_gray_is_luma_of_pillow() -> None:
    image = torch.randint(256, (3, 40, 40), dtype=torch.uint8)
    luma = np.asarray(Image.fromarray(image.permute(1, 2, 0).numpy()).convert("L")).astype(int)
    assert np.abs(to_gray(image[None])[0, 0].numpy() - luma).max() <= 1
