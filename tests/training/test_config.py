import json
import shlex
from typing import Any

import hydra
import pytest
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from training.config import (
    CONFIGS,
    NEW_KEY_ROOTS,
    complete_overrides,
    compose,
    flatten,
    identity,
    is_in_identity,
    resolve,
)
from training.errors import UsageError
from training.record import compute_run_id


def get_identity(*overrides: str) -> dict[str, Any]:
    return identity(resolve(compose(list(overrides))))


def compute_id(*overrides: str) -> str:
    return compute_run_id(get_identity(*overrides))


def test_arrangement_override_accepts_any_layer_name_and_keeps_its_text() -> None:
    cfg = compose(["arrangement.conv1=G2 P4", "arrangement.conv2=G50%_P50%", "arrangement.layer1.0.conv1=G100%"])
    assert cfg.arrangement.conv1 == "G2 P4" and cfg.arrangement.conv2 == "G50%_P50%"
    assert flatten(resolve(cfg)["arrangement"])["layer1.0.conv1"] == "G100%"


@pytest.mark.parametrize(
    "overrides",
    [
        ["optim=sgd", "optim.lr=3e-4", "seed=5", "data=mnist", "data.shift=1"],
        ["seed=2", "model=ana_resnet18", "arrangement=exp3", "model.layer.per=filter", "~optim.label_smoothing"],
        ["arrangement.conv1=G2 P4", "trainer.epochs=3", "+data.max_images=4", "paths.runs=${paths.results}"],
    ],
)
def test_composition_equals_that_of_hydra(overrides: list[str]) -> None:
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        expected = hydra.compose("train", complete_overrides(overrides, "train", NEW_KEY_ROOTS))
    assert OmegaConf.to_yaml(compose(overrides)) == OmegaConf.to_yaml(expected)
    assert OmegaConf.is_struct(compose(overrides))


def test_compose_leaves_hydra_uninitialized() -> None:
    compose([])
    assert not GlobalHydra.instance().is_initialized()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data=nope", "unknown data 'nope'; known: cifar10, cifar10_jpeg, digits, "),
        ("model=nope", "unknown model 'nope'; known: alexnet, ana_alexnet, "),
        ("arrangement=nope", "unknown arrangement 'nope'; known: auto, exp1, "),
        ("trainer.epoch=3", "unknown option trainer.epoch; known: epochs, batch_size, "),
        ("sead=3", "unknown option sead; known: data, model, "),
        ("seed.x=3", "unknown option seed.x"),
        ("seed =3", "cannot read seed =3: no option is named 'seed '"),
        ("optim.lr!=3", "cannot read optim.lr!=3: no option is named 'optim.lr!'"),
        ("seed", "seed"),
    ],
)
def test_invalid_override_raises_one_line_error(override: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as error:
        compose([override])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", ["~/x", "a=b", "a#b", "a(b)", "b\u00fccher", "a;b", "a!b", "it's", 'a"b', "a$(b)"])
def test_error_says_how_to_quote_value_with_special_characters(value: str) -> None:
    with pytest.raises(UsageError, match="quote") as error:
        compose([f"data.root={value}"])
    message = str(error.value)
    assert message.startswith(f"cannot read data.root={value}") and "\n" not in message
    (override,) = shlex.split(message.partition(" in quotes, inside those of the shell: ")[2])
    assert compose([override]).data.root == value


@pytest.mark.parametrize("name", ["k>=5", "conv*", "layer1.*.conv2"])
def test_error_says_where_to_write_names_of_layers_that_a_command_line_cannot_have(name: str) -> None:
    with pytest.raises(UsageError, match=r"write such names of layers to configs/arrangement/<name>\.yaml, and set"):
        compose([f"arrangement.{name}=G100%"])


def test_overrides_add_keys_below_roots_only() -> None:
    overrides = ["arrangement.conv1=G2", "arrangement=auto", "arrangements.conv1=G2", "seed=1", "rows.mine.seed=2"]
    assert complete_overrides(overrides, "train", ("arrangement",)) == ["++arrangement.conv1=G2", *overrides[1:]]
    assert complete_overrides(overrides, "train", ("rows",)) == [*overrides[:-1], "++rows.mine.seed=2"]


@pytest.mark.parametrize(
    ("overrides", "layers"),
    [
        ([], {"conv1", "conv2"}),
        (["seed=3", "model.layer.amplitude=true"], {"conv1", "conv2"}),
        (["model=lenet"], set()),
        (["arrangement.conv1=G6"], {"conv1"}),
        (["model=ana_lenet", "arrangement=mosaic", "arrangement.conv2=null"], {"conv1", "conv2"}),
    ],
)
def test_default_arrangement_is_that_of_default_network(overrides: list[str], layers: set[str]) -> None:
    assert set(compose(overrides).arrangement) == layers


def test_plain_arrangement_is_added_beside_other_overrides() -> None:
    completed = complete_overrides(["-m", "model=lenet", "--cfg", "job"], "train", ())
    assert completed == ["-m", "arrangement=plain", "model=lenet", "--cfg", "job"]


def test_flatten_joins_nested_keys_by_dots() -> None:
    assert flatten({"layer1": {"0": {"conv1": "G2"}}, "fc": None}) == {"layer1.0.conv1": "G2", "fc": None}


def test_resolve_returns_plain_values() -> None:
    values = resolve(OmegaConf.create({"a": 1, "b": "${a}", "c": {"d": ["${c.e}", None], "e": 0.5}}))
    assert values == {"a": 1, "b": 1, "c": {"d": [0.5, None], "e": 0.5}}
    assert type(values) is type(values["c"]) is dict and type(values["c"]["d"]) is list


def test_resolve_leaves_configuration_unchanged() -> None:
    cfg = compose([])
    before = cfg.copy()
    resolve(cfg)["data"]["shift"] = 5
    assert cfg == before


@pytest.mark.parametrize(
    "override",
    [
        "paths.runs=/elsewhere",
        "logger=wandb",
        "fresh=true",
        "data.root=/elsewhere",
        "+data.cache=/elsewhere",
        "trainer.accelerator=cpu",
        "trainer.strategy=ddp",
        "trainer.devices=2",
        "trainer.nodes=2",
        "trainer.deterministic=true",
        "trainer.compile=true",
        "trainer.checkpoint_minutes=1",
    ],
)
def test_override_outside_identity_keeps_run_id(override: str) -> None:
    assert not is_in_identity(override)
    assert compute_id(override) == compute_id()


@pytest.mark.parametrize(
    "override",
    [
        "seed=1",
        "data=mnist",
        "data.shift=1",
        "model=lenet",
        "model.layer.scale=raw",
        "arrangement.conv1=G6",
        "optim.lr=0.1",
        "trainer.epochs=3",
        "trainer.batch_size=32",
        "trainer.test=false",
        "trainer.precision=bf16-mixed",
        "++trainer.unknown=0.2",
    ],
)
def test_override_in_identity_changes_run_id(override: str) -> None:
    assert is_in_identity(override)
    assert compute_id(override) != compute_id()


@pytest.mark.parametrize("override", ["+data.root=/data", "++data.root=/data", "logger.project=mine", "data.root="])
def test_override_outside_identity_is_recognized_in_any_form(override: str) -> None:
    assert not is_in_identity(override)


@pytest.mark.parametrize("override", ["data.rooted=1", "model.paths=1", "trainer=long", "pathslike=1"])
def test_override_with_similar_key_is_in_identity(override: str) -> None:
    assert is_in_identity(override)


def test_null_option_added_later_keeps_run_id() -> None:
    for override in ("++trainer.unknown=null", "++optim.ema=null", "++model.layer.bias=null", "++data.cutmix=null"):
        assert compute_id(override) == compute_id()


def test_options_that_were_always_null_stay_in_identity() -> None:
    assert get_identity("model=lenet")["model"]["layer"] is None
    null_options = ("data=flowers102", "data.mean=null", "data.std=null", "data.crop=null")
    data = get_identity(*null_options)["data"]
    assert [data[key] for key in ("mean", "std", "crop")] == [None, None, None]
    assert compute_id(*null_options) != compute_id("data=flowers102")


def test_order_of_rules_for_layers_is_part_of_the_identity() -> None:
    """A later rule overrides an earlier one, and AKPs are sampled in this order."""
    rules = ["arrangement.all=P100%", "arrangement.conv1=G100%"]
    assert compute_id(*rules) != compute_id(*reversed(rules))
    nested = ["arrangement.layer1.0=G100%", "arrangement.layer1.1=P100%"]
    assert compute_id(*nested) != compute_id(*reversed(nested))


def test_layers_named_by_numbers_have_text_as_names() -> None:
    values = get_identity("arrangement.features={0: G100%}")
    assert values == json.loads(json.dumps(values)) == get_identity("arrangement.features.0=G100%")


def test_null_arrangement_of_a_layer_stays_in_identity() -> None:
    assert get_identity("arrangement.conv1=null")["arrangement"] == {"conv1": None}


@pytest.mark.parametrize(
    ("overrides", "run_id"),
    [
        (["data=digits", "model=ana_lenet"], "1c02c1321810"),
        (["data=cifar10", "model=lenet", "optim=sgd"], "7c13c8251247"),
        (["data=flowers102", "model=ana_resnet18", "arrangement=auto"], "b076c6a09b08"),
        (["data=imagefolder", "model=resnet50", "data.root=x", "data.title=t"], "1f91f3a5e6bf"),
    ],
)
def test_run_id_of_existing_runs_is_unchanged(overrides: list[str], run_id: str) -> None:
    assert compute_id(*overrides) == run_id


def test_identity_leaves_configuration_unchanged() -> None:
    cfg: DictConfig = compose(["++trainer.unknown=null"])
    before = cfg.copy()
    identity(resolve(cfg))
    assert cfg == before
