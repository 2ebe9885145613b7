import os
import re
import sys
from pathlib import Path
from unicodedata import normalize

import numpy as np
import pytest
import torch

from tests.training.image_files import SIZE, ImageFile, list_image_files
from tests.training.trees import write_image
from training.errors import UsageError
from training.image_cache import load_decoded_images
from training.image_folders import ImageFiles, read_imagefolder

CLASSES = (normalize("NFC", "Kühe"), "class 0", "日本語")  # in the order of their numbers
STEMS = [
    "photo 1",
    "Ü (copy)",
    normalize("NFD", "über"),
    "猫",
    "🙂",
    "a=b#c",
    "-x",
    "[1]*?",
    "'quote\"",
    "%20",
    "x" * 200,
]
STEMS += ["new\nline", "double.jpg", os.fsdecode(b"\xff\xe9") if sys.platform == "linux" else "latin"]  # not UTF-8
FOLDERS = ("", "nested", "nested/deeper", "linked", "linked/deeper", "files")


def write_tree(root: Path) -> list[tuple[str, Path, ImageFile]]:
    """Writes every image file to a class of ``train``, under all kinds of names, in folders and through links.

    Returns:
        The class, the path below the class folder and the file, in the order in which they are listed.
    """
    for number, name in enumerate(CLASSES):
        target = root / "elsewhere" / str(number)
        (target / "deeper").mkdir(parents=True)
        (root / "train" / name / "files").mkdir(parents=True)
        (root / "train" / name / "linked").symlink_to(target)
        (root / "train" / name / "z linked twice").symlink_to(target)
        (target / "to itself").symlink_to(target)
        (target / "deeper" / "to all classes").symlink_to(root)
    entries = []
    for i, file in enumerate(list_image_files()):
        suffix = file.suffix.upper() if i % 5 == 0 else file.suffix
        label, path = CLASSES[i % 3], Path(FOLDERS[i % len(FOLDERS)], f"{STEMS[i % len(STEMS)]} {i}.{suffix}")
        absolute = root / "train" / label / path
        absolute.parent.mkdir(parents=True, exist_ok=True)
        if path.parts[0] == "files":
            stored = root / "elsewhere" / f"{i}.bin"
            stored.write_bytes(file.content)
            absolute.symlink_to(stored)
        else:
            absolute.write_bytes(file.content)
        entries.append((label, path, file))
    return sorted(entries, key=lambda entry: (entry[0], [normalize("NFC", part) for part in entry[1].parts]))


@pytest.mark.filterwarnings("error")
def test_folders_of_all_kinds_of_images_have_right_pixels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    entries = write_tree(tmp_path)
    assert len(entries) > 200
    for split in ("val", "test"):
        for k, label in enumerate(CLASSES):
            write_image(tmp_path / split / normalize("NFD", label) / "a.png", k, 0)
    files = ImageFiles(
        root=tmp_path, cache=tmp_path / "cache", title="mine", size=SIZE, validation=0.1, skip_undecodable=True
    )
    train, val, test = read_imagefolder(files).load()
    right = [(label, file) for label, _, file in entries if file.expected is not None]
    assert train.labels.tolist() == [CLASSES.index(label) for label, _ in right]
    differences = train.images.permute(0, 2, 3, 1).numpy() - np.stack([file.expected for _, file in right])
    largest = np.abs(differences).max((1, 2, 3))
    assert {file.name: value for (_, file), value in zip(right, largest, strict=True) if value > 2} == {}
    assert torch.equal(val.labels, torch.arange(3)) and torch.equal(test.labels, torch.arange(3))

    wrong = [tmp_path / "train" / label / path for label, path, file in entries if file.expected is None]
    assert f"left out {len(wrong)} images that cannot be decoded" in capsys.readouterr().err
    for path in wrong:
        with pytest.raises(UsageError, match=rf"{re.escape(str(path))} cannot be decoded \(.*\)"):
            load_decoded_images(path.parent, [path], SIZE, tmp_path / "cache", "mine")


def test_images_in_one_class_folder_are_refused(tmp_path: Path) -> None:
    for path in ("train/images/cat/1.png", "train/images/dog/2.png", "test/images/cat/3.png"):
        write_image(tmp_path / path, 0, 0)
    files = ImageFiles(
        root=tmp_path, cache=tmp_path / "cache", title="mine", size=SIZE, validation=0.5, skip_undecodable=False
    )
    with pytest.raises(UsageError, match="all images are of one class, 'images'; each class needs a folder of its own"):
        read_imagefolder(files)
