import pytest
from hydra.core.global_hydra import GlobalHydra

from training.config import compose
from training.errors import UsageError


def test_layers_are_named_freely_and_values_keep_their_signs() -> None:
    cfg = compose(["arrangement.conv1=G2 P4", "arrangement.conv2=G50%_P50%", "arrangement.layer1.0.conv1=G100%"])
    assert cfg.arrangement.conv1 == "G2 P4" and cfg.arrangement.conv2 == "G50%_P50%"
    assert not GlobalHydra.instance().is_initialized()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data=nope", "unknown data 'nope'; known: cifar10, digits, "),
        ("model=nope", "unknown model 'nope'; known: alexnet, ana_alexnet, "),
        ("arrangement=nope", "unknown arrangement 'nope'; known: auto, exp1, "),
        ("trainer.epoch=3", "trainer.epoch"),
        ("seed", "seed"),
    ],
)
def test_overrides_that_do_not_fit_are_one_line(override: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as error:
        compose([override])
    assert "\n" not in str(error.value)
