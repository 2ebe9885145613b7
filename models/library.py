"""Networks of torchvision and timm, from scratch, with the library's pretrained weights, or with one's own file."""

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


def from_torchvision(name: str, channels: int, classes: int, pretrained: bool | str = False) -> nn.Module:
    """A classifier of torchvision for RGB images.

    Args:
        name: as in ``torchvision.models.get_model``.
        classes: the last linear layer is drawn anew where the weights are for another number of classes.
        pretrained: True for torchvision's weights, or the path of a file, see ``load_weights``.

    Raises:
        ValueError: images of another number of channels, or weights that are not to be had or do not fit.
    """
    if channels != 3:
        raise ValueError(f"{name} takes images of 3 channels, not {channels}")
    model = torchvision.models.get_model(name, num_classes=classes)
    if pretrained is True:
        weights = torchvision.models.get_model_weights(name).DEFAULT
        file = Path(torch.hub.get_dir()) / "checkpoints" / Path(urlparse(weights.url).path).name
        try:
            state = weights.get_state_dict(progress=True, check_hash=True, weights_only=True)
        except Exception as error:
            told = f"{file} cannot be read" if file.exists() else f"{file.name} could not be downloaded ({error})"
            raise ValueError(
                f"no pretrained {name}: {told}; put {file.name} into {file.parent}, or name a file of weights with "
                "model.pretrained=<path>"
            ) from error
        _adopt(model, state, file)
    elif pretrained:
        load_weights(model, Path(pretrained))
    return model


def from_timm(name: str, channels: int, classes: int, pretrained: bool | str = False) -> nn.Module:
    """A network of timm by its name, as in ``timm.list_models()``; arguments and errors as ``from_torchvision``.

    timm itself fits pretrained weights to other numbers of channels.
    """
    import timm  # here alone: it takes over a second, which other networks need not wait for

    bare = name.split(".")[0]
    if not timm.is_model(bare):
        close = difflib.get_close_matches(bare, timm.list_models(), 3)
        raise ValueError(f"timm has no model '{name}'" + (f"; near it: {', '.join(close)}" if close else ""))
    try:
        model = timm.create_model(name, pretrained=pretrained is True, num_classes=classes, in_chans=channels)
    except Exception as error:
        if pretrained is not True:
            raise ValueError(f"timm cannot make '{name}': {' '.join(str(error).split())}") from error
        raise ValueError(
            f"no pretrained {name}: its weights (model.safetensors of timm/{name} on the Hugging Face hub) are neither "
            f"in the hub's cache nor could they be downloaded ({type(error).__name__}); get them where there is a "
            "network, and name the file with model.pretrained=<path>"
        ) from error
    if pretrained and pretrained is not True:
        load_weights(model, Path(pretrained))
    return model


def load_weights(model: nn.Module, file: Path) -> None:
    """Loads a model's weights from ``.safetensors``, ``.pth`` (tensors alone), or one convolution's from ``.npy``.

    The last linear layer may be for another number of classes, and then stays as it is. A ``.npy`` (out, in / groups,
    kh, kw) goes to the first convolution of its shape.

    Raises:
        ValueError: a file that is not there, cannot be read, or is of another architecture (names the keys).
    """
    state = _read(file)
    if isinstance(state, Tensor):
        shapes = {n: tuple(m.weight.shape) for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}
        name = next((n for n, shape in shapes.items() if shape == tuple(state.shape)), None)
        if name is None:
            listed = ", ".join(f"{n} {shape}" for n, shape in shapes.items())
            raise ValueError(f"no convolution has the shape {tuple(state.shape)} of {file}; there are: {listed}")
        with torch.no_grad():
            model.get_parameter(f"{name}.weight").copy_(state)
    else:
        _adopt(model, state, file)


def read_kernels(file: Path) -> Tensor:
    """One convolution's weight from ``.npy``, float32. Raises ValueError for a file that is none."""
    kernels: Tensor = _read(file)
    return kernels


def _read(file: Path) -> Any:
    readers: dict[str, Callable[[Path], Any]] = {
        ".npy": _read_npy,
        ".safetensors": load_file,
        ".pth": _read_pth,
        ".pt": _read_pth,
    }
    if file.suffix not in readers:
        raise ValueError(f"weights in '{file}'? Known: {', '.join(readers)}")
    try:
        return readers[file.suffix](file)
    except FileNotFoundError as error:
        raise ValueError(f"no weights in {file}: there is no such file") from error
    except Exception as error:
        raise ValueError(f"{file} cannot be read as weights: {' '.join(str(error).split())[:200]}") from error


def _read_npy(file: Path) -> Tensor:
    return torch.from_numpy(np.load(file, allow_pickle=False)).float()


def _read_pth(file: Path) -> Mapping[str, Any]:
    state = torch.load(file, map_location="cpu", weights_only=True)
    return state.get("state_dict", state)


def _adopt(model: nn.Module, state: Mapping[str, Any], file: Path) -> None:
    own = model.state_dict()
    head = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)][-1:]
    other = [k for k in own if k in state and state[k].shape != own[k].shape and k.rpartition(".")[0] not in head]
    missing = [k for k in own if k not in state and not k.endswith("num_batches_tracked")]
    unknown = [k for k in state if k not in own]
    if other or missing or unknown:
        differing = [
            *(f"{k} is {tuple(state[k].shape)}, not {tuple(own[k].shape)}" for k in other[:2]),
            *(f"{k} is missing" for k in missing[:2]),
            *(f"{k} is unknown" for k in unknown[:2]),
        ]
        raise ValueError(f"{file} is of another architecture than {type(model).__name__}: {'; '.join(differing)}")
    model.load_state_dict({k: v for k, v in state.items() if v.shape == own[k].shape}, strict=False)
