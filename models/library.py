"""Networks of torchvision and timm, from scratch or with pretrained weights of the library or from a file."""

import difflib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import numpy as np
import torch
import torchvision
from safetensors.torch import load_file
from torch import Tensor, nn


def create_from_torchvision(name: str, channels: int, classes: int, pretrained: bool | str = False) -> nn.Module:
    """Creates a torchvision classifier for RGB images.

    Args:
        name: as in ``torchvision.models.get_model``.
        channels: of the images; must be 3.
        classes: the last linear layer is initialized at random if the weights are for another number of classes.
        pretrained: True for torchvision's weights, or the path of a file (see ``load_weights``).

    Raises:
        ValueError: for images that do not have 3 channels, or weights that are unavailable or do not fit.
    """
    if channels != 3:
        raise ValueError(f"{name} takes images with 3 channels, not {channels}")
    model = torchvision.models.get_model(name, num_classes=classes)
    if pretrained is True:
        weights = torchvision.models.get_model_weights(name).DEFAULT
        file = Path(torch.hub.get_dir()) / "checkpoints" / Path(urlparse(weights.url).path).name
        try:
            state = weights.get_state_dict(progress=True, check_hash=True, weights_only=True)
        except Exception as error:
            reason = f"{file} cannot be read" if file.exists() else f"{file.name} could not be downloaded ({error})"
            raise ValueError(
                f"no pretrained {name}: {reason}; put {file.name} into {file.parent}, or set model.pretrained=<path> "
                "to a file of weights"
            ) from error
        _load_state(model, state, file)
    elif pretrained:
        load_weights(model, Path(pretrained))
    return model


def create_from_timm(name: str, channels: int, classes: int, pretrained: bool | str = False) -> nn.Module:
    """Creates a timm network by its name in ``timm.list_models()``; arguments and errors as for torchvision.

    timm adapts pretrained weights to other numbers of channels.
    """
    import timm  # imported here because it takes over a second, which other networks need not spend

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
            f"no pretrained {name}: its weights (model.safetensors of timm/{name} on the Hugging Face hub) are not in "
            f"the hub's cache and could not be downloaded ({type(error).__name__}); download them elsewhere and set "
            "model.pretrained=<path> to the file"
        ) from error
    if pretrained and pretrained is not True:
        load_weights(model, Path(pretrained))
    return model


def load_weights(model: nn.Module, file: Path) -> None:
    """Loads a model's weights from ``.safetensors`` or ``.pth`` (tensors only), or one convolution's from ``.npy``.

    The last linear layer keeps its weights if those in the file are for another number of classes. A ``.npy`` array
    (out, in / groups, kh, kw) is loaded into the first convolution with its shape.

    Raises:
        ValueError: if the file is missing, unreadable, or for another architecture (the message names the keys).
    """
    state = _read_weights(file)
    if isinstance(state, Tensor):
        shapes = {n: tuple(m.weight.shape) for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}
        name = next((n for n, shape in shapes.items() if shape == tuple(state.shape)), None)
        if name is None:
            listed = ", ".join(f"{n} {shape}" for n, shape in shapes.items())
            raise ValueError(f"no convolution has the shape {tuple(state.shape)} of {file}; the model has: {listed}")
        with torch.no_grad():
            model.get_parameter(f"{name}.weight").copy_(state)
    else:
        _load_state(model, state, file)


def read_kernels(file: Path) -> Tensor:
    """Reads an array such as one convolution's weight from ``.npy`` as float32. Raises ValueError for other files."""
    kernels = _read_weights(file)
    if not isinstance(kernels, Tensor):
        raise ValueError(f"{file} is not an array; its name must end in .npy")
    return kernels


def _read_weights(file: Path) -> Any:
    readers: dict[str, Callable[[Path], Any]] = {
        ".npy": _read_npy,
        ".safetensors": load_file,
        ".pth": _read_pth,
        ".pt": _read_pth,
    }
    if file.suffix not in readers:
        raise ValueError(f"cannot read weights from '{file}': its name must end in {', '.join(readers)}")
    try:
        return readers[file.suffix](file)
    except FileNotFoundError as error:
        raise ValueError(f"cannot read weights from {file}: there is no such file") from error
    except Exception as error:
        raise ValueError(f"cannot read weights from {file}: {' '.join(str(error).split())[:200]}") from error


def _read_npy(file: Path) -> Tensor:
    return torch.from_numpy(np.load(file, allow_pickle=False)).float()


def _read_pth(file: Path) -> Mapping[str, Any]:
    state = torch.load(file, map_location="cpu", weights_only=True)
    return state.get("state_dict", state)


def _load_state(model: nn.Module, state: Mapping[str, Any], file: Path) -> None:
    own = model.state_dict()
    head = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)][-1:]
    other_shape = [k for k in own if k in state and state[k].shape != own[k].shape and k.rpartition(".")[0] not in head]
    missing = [k for k in own if k not in state and not k.endswith("num_batches_tracked")]
    unknown = [k for k in state if k not in own]
    if other_shape or missing or unknown:
        differences = [
            *(f"{k} is {tuple(state[k].shape)}, not {tuple(own[k].shape)}" for k in other_shape[:2]),
            *(f"{k} is missing" for k in missing[:2]),
            *(f"{k} is unknown" for k in unknown[:2]),
        ]
        raise ValueError(f"{file} is for another architecture than {type(model).__name__}: {'; '.join(differences)}")
    model.load_state_dict({k: v for k, v in state.items() if v.shape == own[k].shape}, strict=False)
