import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from training.data import Augmentation, load_data
from training.datasets import DATASETS
from training.errors import UsageError
from training.optim import OptimSettings
from training.settings import TrainerSettings
from training.validation import construct, format_value


class Section(NamedTuple):
    """A section of the configuration with valid options."""

    factory: Callable[..., Any]
    name: str
    options: Mapping[str, Any]


OPTIM = Section(
    OptimSettings,
    "optim",
    {
        "name": "sgd",
        "lr": 0.1,
        "akp_lr_scale": 5.0,
        "momentum": 0.9,
        "weight_decay": 0.01,
        "schedule": "cosine",
        "label_smoothing": 0.0,
    },
)
TRAINER = Section(
    TrainerSettings,
    "trainer",
    {
        "epochs": 1,
        "batch_size": 128,
        "accelerator": "cpu",
        "strategy": "auto",
        "devices": 1,
        "nodes": 1,
        "precision": "32-true",
        "deterministic": False,
        "channels_last": True,
        "compile": False,
        "test": True,
        "checkpoint_minutes": 5.0,
    },
)
AUGMENTATION = Section(Augmentation, "data", {"shift": 1, "flip": True, "crop": 24, "min_area": 0.25})
IMAGEFOLDER = Section(
    DATASETS["imagefolder"],
    "data",
    {"root": "data", "cache": "cache", "title": "mine", "size": 32, "validation": 0.1, "skip_undecodable": False},
)
SETTINGS = [OPTIM, TRAINER, AUGMENTATION]
SECTIONS = [*SETTINGS, IMAGEFOLDER]

INTEGERS = [(TRAINER, "epochs"), (TRAINER, "devices"), (AUGMENTATION, "shift"), (AUGMENTATION, "crop")]
INTEGERS += [(TRAINER, "batch_size"), (TRAINER, "nodes"), (IMAGEFOLDER, "size")]
REALS = [(OPTIM, "lr"), (OPTIM, "akp_lr_scale"), (OPTIM, "momentum"), (OPTIM, "weight_decay")]
REALS += [(OPTIM, "label_smoothing"), (TRAINER, "checkpoint_minutes"), (AUGMENTATION, "min_area")]
REALS += [(IMAGEFOLDER, "validation")]
BOOLEANS = [(TRAINER, "deterministic"), (TRAINER, "channels_last"), (TRAINER, "compile"), (TRAINER, "test")]
BOOLEANS += [(AUGMENTATION, "flip"), (IMAGEFOLDER, "skip_undecodable")]
TEXTS = [(TRAINER, "accelerator"), (TRAINER, "strategy"), (TRAINER, "precision"), (IMAGEFOLDER, "title")]
TEXTS += [(OPTIM, "name"), (OPTIM, "schedule")]
PATHS = [(IMAGEFOLDER, "root"), (IMAGEFOLDER, "cache")]


def get_error(section: Section, options: Mapping[str, Any]) -> str:
    with pytest.raises(UsageError) as error:
        construct(section.factory, options, section.name)
    return str(error.value)


def assert_invalid(section: Section, key: str, value: Any) -> str:
    """Asserts that the value is rejected by one line that names it and its key; returns the line."""
    message = get_error(section, {**section.options, key: value})
    assert message.startswith(f"{section.name}.{key}={format_value(value)} is invalid: it "), message
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        *((None, "null"), (True, "true"), (False, "false"), (1, "1"), (0.5, "0.5"), (["a", 1], "['a', 1]")),
        *(("None", "None"), ("True", "'True'"), ("null", "'null'"), ("1", "'1'"), ("1e-3", "'1e-3'"), ("nan", "'nan'")),
        *(("fast", "fast"), ("two words", "two words"), ("two\nlines", "two lines"), ("", "''"), ("[a", "[a")),
    ],
)
def test_value_is_formatted_as_on_command_line(value: Any, expected: str) -> None:
    assert format_value(value) == expected


def test_home_folder_in_paths_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    message = get_error(IMAGEFOLDER, {**IMAGEFOLDER.options, "root": "~/photos"})
    assert message.startswith(f"no folder {tmp_path / 'photos' / 'train'}")


@pytest.mark.parametrize("section", SETTINGS)
def test_valid_options_are_kept(section: Section) -> None:
    settings = vars(construct(section.factory, section.options, section.name))
    assert section.options.items() <= settings.items()


def test_integer_is_a_valid_real_number() -> None:
    lr = construct(OptimSettings, {**OPTIM.options, "lr": 1}, "optim").lr
    assert lr == 1 and isinstance(lr, float)


def test_default_fills_missing_option() -> None:
    options = {key: value for key, value in OPTIM.options.items() if key != "momentum"}
    assert construct(OptimSettings, options, "optim").momentum == 0.9


def test_null_is_valid_only_for_options_that_allow_it() -> None:
    augmentation = construct(Augmentation, {**AUGMENTATION.options, "crop": None, "min_area": None}, "data")
    assert augmentation.crop is None and augmentation.min_area is None
    for section, key in [*INTEGERS, *REALS, *BOOLEANS, *TEXTS, *PATHS]:
        if (section, key) not in [(AUGMENTATION, "crop"), (AUGMENTATION, "min_area")]:
            assert get_error(section, {**section.options, key: None}).startswith(f"{section.name}.{key}=")


@pytest.mark.parametrize("section", SECTIONS)
def test_unknown_option_is_named_with_its_value(section: Section) -> None:
    assert get_error(section, {**section.options, "foo": 3}) == f"unknown option {section.name}.foo=3"


@pytest.mark.parametrize(
    ("section", "key"), [(OPTIM, "lr"), (TRAINER, "epochs"), (AUGMENTATION, "flip"), (IMAGEFOLDER, "root")]
)
def test_missing_option_is_named(section: Section, key: str) -> None:
    options = {name: value for name, value in section.options.items() if name != key}
    assert get_error(section, options) == f"{section.name}.{key} is missing"


def test_option_without_section_is_named_by_its_key() -> None:
    with pytest.raises(UsageError, match=r"^lr=fast is invalid: it should be a valid number$"):
        construct(OptimSettings, {**OPTIM.options, "lr": "fast"})


@pytest.mark.parametrize(
    ("section", "key", "value", "limit"),
    [
        (OPTIM, "name", "lion", "'adamw' or 'sgd'"),
        (OPTIM, "schedule", "step", "'onecycle' or 'cosine'"),
        (OPTIM, "lr", 0, "greater than 0"),
        (OPTIM, "lr", -0.1, "greater than 0"),
        (OPTIM, "akp_lr_scale", 0, "greater than 0"),
        (OPTIM, "weight_decay", -1e-9, "greater than or equal to 0"),
        (OPTIM, "label_smoothing", -0.1, "greater than or equal to 0"),
        (OPTIM, "label_smoothing", 1, "less than 1"),
        (OPTIM, "momentum", 1.0, "less than 1"),
        (TRAINER, "epochs", 0, "greater than or equal to 1"),
        (TRAINER, "batch_size", 0, "greater than or equal to 1"),
        (TRAINER, "devices", 0, "greater than or equal to 1"),
        (TRAINER, "nodes", -1, "greater than or equal to 1"),
        (TRAINER, "checkpoint_minutes", 0, "greater than 0"),
        (AUGMENTATION, "shift", -1, "greater than or equal to 0"),
        (AUGMENTATION, "shift", 17, "less than or equal to 16"),
        (AUGMENTATION, "crop", 0, "greater than or equal to 1"),
        (AUGMENTATION, "min_area", 0, "greater than 0"),
        (AUGMENTATION, "min_area", 1.5, "less than or equal to 1"),
        (IMAGEFOLDER, "size", 0, "greater than or equal to 1"),
        (IMAGEFOLDER, "validation", 0, "greater than 0"),
        (IMAGEFOLDER, "validation", 1, "less than 1"),
    ],
)
def test_value_out_of_range_is_rejected_with_its_limit(section: Section, key: str, value: Any, limit: str) -> None:
    assert assert_invalid(section, key, value).endswith(f"it should be {limit}")


@pytest.mark.parametrize("value", [True, False])
@pytest.mark.parametrize(("section", "key"), [*INTEGERS, *REALS])
def test_boolean_is_not_a_number(section: Section, key: str, value: bool) -> None:
    assert_invalid(section, key, value)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("section", "key"), [*INTEGERS, *REALS])
def test_number_that_is_not_finite_is_rejected(section: Section, key: str, value: float) -> None:
    assert_invalid(section, key, value)


@pytest.mark.parametrize("value", ["1", "0.5", "1e-3", "fast", ""])
@pytest.mark.parametrize(("section", "key"), [*INTEGERS, *REALS])
def test_text_is_not_a_number(section: Section, key: str, value: str) -> None:
    assert_invalid(section, key, value)


@pytest.mark.parametrize("value", [1.0, 2.5])
@pytest.mark.parametrize(("section", "key"), INTEGERS)
def test_real_number_is_not_an_integer(section: Section, key: str, value: float) -> None:
    assert_invalid(section, key, value)


@pytest.mark.parametrize("value", [0, 1, "true", "no"])
@pytest.mark.parametrize(("section", "key"), BOOLEANS)
def test_number_and_text_are_not_booleans(section: Section, key: str, value: Any) -> None:
    assert_invalid(section, key, value)


@pytest.mark.parametrize("value", [3, True, ["a"]])
@pytest.mark.parametrize(("section", "key"), [*TEXTS, *PATHS])
def test_other_types_are_not_text(section: Section, key: str, value: Any) -> None:
    assert_invalid(section, key, value)


@pytest.mark.parametrize("value", [True, math.nan, "half"])
def test_invalid_item_of_a_list_is_named_by_its_index(value: Any) -> None:
    augmentation = Augmentation(shift=0, flip=False)
    options = {"name": "digits", "root": "data", "augmentation": augmentation, "mean": [value], "std": [0.5]}
    with pytest.raises(UsageError, match=rf"^data\.mean\.0={format_value(value)} is invalid: it should be a "):
        construct(load_data, options, "data")


def test_invalid_reader_option_is_named_by_load_data() -> None:
    augmentation = Augmentation(shift=0, flip=False)
    options = {**IMAGEFOLDER.options, "name": "imagefolder", "augmentation": augmentation, "size": "large"}
    with pytest.raises(UsageError, match=r"^data\.size=large is invalid: it should be a valid integer$"):
        construct(load_data, options, "data")
