"""Networks from torchvision and timm, initialized at random or with pretrained weights from the library or a file."""

import difflib
import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any
from urllib.parse import urlparse

import numpy as np
import torch
import torchvision
from torch import Tensor, nn


def find_torchvision_weights(name: str) -> Path:
    """Where torchvision stores the pretrained weights of a network."""
    url = torchvision.models.get_model_weights(name).DEFAULT.url
    return Path(torch.hub.get_dir()) / "checkpoints" / Path(urlparse(url).path).name


def find_imagenet_labels(classes: Sequence[str]) -> list[int]:
    """The labels of classes among the 1,000 of ImageNet, by their WordNet ids or torchvision's names.

    Raises:
        ValueError: for a class that ImageNet does not have.
    """
    from timm.data import ImageNetInfo  # imported here because it takes more than a second

    names = torchvision.models.get_model_weights("resnet18").DEFAULT.meta["categories"]
    labels = {
        name: label for known in (names, ImageNetInfo("imagenet-1k").label_names()) for label, name in enumerate(known)
    }
    if unknown := [name for name in classes if name not in labels]:
        raise ValueError(
            f"class '{unknown[0]}' is none of ImageNet's: it is neither the WordNet id of one, such as n01440764, nor "
            "its name in torchvision, such as tench"
        )
    return [labels[name] for name in classes]


def create_from_torchvision(
    name: str, channels: int, classes: int, pretrained: bool | str = False, random_layers: list[str] | None = None
) -> nn.Module:
    """Creates a torchvision classifier for RGB images.

    Args:
        name: as in ``torchvision.models.get_model``.
        channels: the number of image channels; must be 3.
        classes: the number of classes. The last linear layer, or the last convolution of a network without linear
            layers, is initialized at random if the weights have another.
        pretrained: True for torchvision's weights, or the path of a weights file (see ``load_weights``).
        random_layers: the layers that the weights file lacks, which keep their random weights; None: it has all.

    Returns:
        The network; ``find_random_layers`` lists the layers of a pretrained one that start at random.

    Raises:
        ValueError: if ``channels`` is not 3, or the weights are unavailable or do not fit the network.
    """
    if channels != 3:
        raise ValueError(f"{name} takes images with 3 channels, not {channels}")
    _check_random_layers(pretrained, random_layers)
    model = torchvision.models.get_model(name, num_classes=classes)
    if pretrained is True:
        weights, file = torchvision.models.get_model_weights(name).DEFAULT, find_torchvision_weights(name)
        try:
            state = weights.get_state_dict(progress=True, check_hash=True, weights_only=True)
        except Exception as error:
            reason = f"{file} cannot be read" if file.exists() else f"{file.name} could not be downloaded ({error})"
            raise ValueError(
                f"cannot load pretrained {name}: {reason}; put {file.name} into {file.parent}, or set "
                "model.pretrained=<path> to a weights file"
            ) from error
        _load_state(model, state, file, [])
    elif pretrained is not False:
        load_weights(model, Path(pretrained), random_layers or [])
    return model


def create_from_timm(
    name: str, channels: int, classes: int, pretrained: bool | str = False, random_layers: list[str] | None = None
) -> nn.Module:
    """Creates a timm network by its name in ``timm.list_models()``.

    The arguments and errors are those of ``create_from_torchvision``, but ``channels`` can be any number: timm adapts
    its pretrained weights.
    """
    import timm  # imported here because it takes more than a second and other networks do not need it

    _check_random_layers(pretrained, random_layers)

    architecture = name.split(".")[0]
    if not timm.is_model(architecture):
        similar = difflib.get_close_matches(architecture, timm.list_models(), 3)
        raise ValueError(f"timm has no model '{name}'" + (f"; similar names: {', '.join(similar)}" if similar else ""))
    try:
        model = timm.create_model(name, pretrained=pretrained is True, num_classes=classes, in_chans=channels)
    except Exception as error:
        if pretrained is not True:
            raise ValueError(f"timm cannot create '{name}': {' '.join(str(error).split())}") from error
        raise ValueError(
            f"cannot load pretrained {name}: its weights (model.safetensors of timm/{name} on the Hugging Face hub) "
            f"are not in the local cache and could not be downloaded ({type(error).__name__}); download them elsewhere "
            "and set model.pretrained=<path> to the file"
        ) from error
    if pretrained is True:
        config: dict[str, Any] = vars(model)["pretrained_cfg"]
        classifiers = [config["classifier"]] if isinstance(config["classifier"], str) else list(config["classifier"])
        _set_random_layers(model, classifiers if classes != config["num_classes"] else [])
    elif pretrained is not False:
        load_weights(model, Path(pretrained), random_layers or [])
    return model


def _check_random_layers(pretrained: bool | str, random_layers: list[str] | None) -> None:
    if random_layers is not None and isinstance(pretrained, bool):
        raise ValueError(
            f"model.random_layers={random_layers} needs model.pretrained=<path>, a file without these layers"
        )


def load_weights(model: nn.Module, file: Path, random_layers: Sequence[str] = ()) -> None:
    """Loads a model's weights from ``.safetensors``, ``.pt`` or ``.pth``, or one convolution's weight from ``.npy``.

    Training checkpoints are accepted as timm reads them: the state dict may be an entry such as ``state_dict`` or
    ``model``, averaged weights (``state_dict_ema``, ``model_ema``) take precedence, and the prefixes ``module.`` and
    ``_orig_mod.`` of DistributedDataParallel and torch.compile are removed. Nothing but tensors and plain values is
    unpickled.

    The last linear layer, or the last convolution of a network without linear layers, keeps its weights if the file has
    another number of classes. A ``.npy`` array (out, in / groups, kh, kw) is loaded into the first convolution whose
    weight has that shape.

    Args:
        model: the network.
        file: the weights file.
        random_layers: the layers that the file lacks, which keep their weights, such as ``["layer4", "fc"]``.

    Raises:
        ValueError: if the file is missing, unreadable, or does not match the model's architecture.
    """
    state = _read_weights(file)
    if isinstance(state, Tensor):
        if random_layers:
            raise ValueError(f"{file} holds one convolution's weight, so model.random_layers must be null")
        shapes = {n: tuple(m.weight.shape) for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}
        name = next((n for n, shape in shapes.items() if shape == tuple(state.shape)), None)
        if name is None:
            available = ", ".join(f"{n} {shape}" for n, shape in shapes.items())
            raise ValueError(f"no convolution has the shape {tuple(state.shape)} of {file}; the model has: {available}")
        with torch.no_grad():
            model.get_parameter(f"{name}.weight").copy_(state)
        _set_random_layers(model, _list_layers_beside(model, name))
    else:
        _load_state(model, state, file, random_layers)


def read_kernels(file: Path) -> Tensor:
    """Reads an array, such as a convolution's weight, from ``.npy`` as float32. Raises ValueError for other files."""
    kernels = _read_weights(file)
    if not isinstance(kernels, Tensor):
        raise ValueError(f"{file} holds the weights of a model, not one array; use a .npy file")
    return kernels


def _read_weights(file: Path) -> Any:
    """Reads a tensor from ``.npy``, or a state dict from any other format."""
    file = Path(os.path.expanduser(file))  # noqa: PTH111 - Path.expanduser raises RuntimeError for an unknown user
    readers: dict[str, Callable[[Path], Any]] = {
        ".npy": _read_npy,
        ".safetensors": _read_state,
        ".pth": _read_state,
        ".pt": _read_state,
    }
    if file.suffix not in readers:
        raise ValueError(f"cannot read weights from '{file}': its name must end in {', '.join(readers)}")
    if not file.exists():
        raise ValueError(f"cannot read weights from {file}: there is no such file")
    try:
        weights = readers[file.suffix](file)
        for name, tensor in weights.items() if isinstance(weights, dict) else [("it", weights)]:
            if tensor.is_complex():
                raise ValueError(f"{name} has complex numbers")
            if not tensor.float().isfinite().all():
                raise ValueError(f"{name} has numbers that are not finite in float32")
    except Exception as error:
        reason, is_refused, _ = str(error).partition(" No automatic unsafe pickle fallback")  # timm's error
        reason = shorten(reason, 250, placeholder=" ...") + (" Save the state dict alone." if is_refused else "")
        raise ValueError(f"cannot read weights from {file}: {reason}") from error
    return weights if isinstance(weights, dict) else weights.float()


def _read_npy(file: Path) -> Tensor:
    return torch.from_numpy(np.load(file, allow_pickle=False))


def _read_state(file: Path) -> dict[str, Tensor]:
    from timm.models import load_state_dict  # imported here because it takes more than a second

    state = load_state_dict(str(file), weights_only=True)
    state.pop("n_averaged", None)  # the counter of torch.optim.swa_utils.AveragedModel
    if unknown := [key for key, value in state.items() if not isinstance(value, Tensor)]:
        raise ValueError(f"it is not a state dict of tensors, or a checkpoint with one: {unknown[0]} is not a tensor")
    return state


def _load_state(model: nn.Module, state: Mapping[str, Any], file: Path, random_layers: Sequence[str]) -> None:
    """Loads a state dict, except for ``random_layers`` and a classifier of another shape.

    ``file`` is named in errors.
    """
    expected = model.state_dict()
    for layer in random_layers:
        if not any(k.startswith(f"{layer}.") for k in expected):
            layers = ", ".join(_list_layers_beside(model, ""))
            raise ValueError(f"{type(model).__name__} has no layer '{layer}' with weights; it has {layers}")
        if any(k.startswith(f"{layer}.") for k in state):
            raise ValueError(f"{file} has weights for {layer}, which is listed as a layer that it lacks")
    classifiers = _find_classifier(model)
    mismatched = [
        k
        for k in expected
        if k in state
        and state[k].shape != expected[k].shape
        and (k.rpartition(".")[0] not in classifiers or state[k].shape[1:] != expected[k].shape[1:])
    ]
    prefixes = tuple(f"{layer}." for layer in random_layers)
    missing = [
        k for k in expected if k not in state and not k.startswith(prefixes) and not k.endswith("num_batches_tracked")
    ]
    unknown = [k for k in state if k not in expected]
    if mismatched or missing or unknown:
        differences = [
            *(f"{k} is {tuple(state[k].shape)}, not {tuple(expected[k].shape)}" for k in mismatched[:2]),
            *(f"{k} is missing" for k in missing[:2]),
            *(f"{k} is unknown" for k in unknown[:2]),
        ]
        raise ValueError(f"{file} does not match the architecture of {type(model).__name__}: {'; '.join(differences)}")
    loaded = {k: v for k, v in state.items() if v.shape == expected[k].shape}
    model.load_state_dict(loaded, strict=False)
    resized = [layer for layer in classifiers if f"{layer}.weight" in state.keys() - loaded.keys()]
    _set_random_layers(model, [*random_layers, *resized])


def _find_classifier(model: nn.Module) -> list[str]:
    """The name of the last linear layer, or of the last convolution of a network without one; empty without both."""
    for layer_type in (nn.Linear, nn.Conv2d):
        if names := [name for name, module in model.named_modules() if isinstance(module, layer_type)]:
            return names[-1:]
    return []


def _list_layers_beside(model: nn.Module, layer: str) -> list[str]:
    """The names of the outermost layers with parameters that do not contain ``layer``; for "", all outermost layers."""
    containing = {"", *itertools.accumulate(layer.split("."), "{}.{}".format)}
    return [
        name
        for name, module in model.named_modules()
        if name not in containing and name.rpartition(".")[0] in containing and any(True for _ in module.parameters())
    ]


def find_random_layers(model: nn.Module) -> list[str] | None:
    """The layers of a pretrained network that kept their random weights; None for a network trained from scratch."""
    return getattr(model, "random_layers", None)


def _set_random_layers(model: nn.Module, layers: list[str]) -> None:
    model.random_layers = layers  # type: ignore[assignment] # a plain attribute
