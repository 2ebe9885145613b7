"""Weight files that describe themselves: a state dict, with the specification of every analytic layer as metadata."""

import json
import os
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize_tensors
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from acl.arrangement import decode_placement
from acl.computed_conv import CONVOLUTION_FIELDS, get_convolution_arguments
from acl.convert import check_convertible, create_analytic, replace_convolutions, share_parameters
from acl.layer import AnalyticConv2d
from acl.options import LayerOptions

FORMAT = 1
_METADATA_KEY = "acl"  # the only one: safetensors writes several keys in random order
_WRAPPER_PREFIXES = ("module.", "_orig_mod.")
_OPTIONS = {field.name: field.default for field in fields(LayerOptions) if field.name not in ("learn", "compute")}
_FIELDS = {"class", "bias", *CONVOLUTION_FIELDS, "arrangement", "has_placement", *_OPTIONS, "learn"}


def save(model: nn.Module, file: str | Path, info: Any = None) -> None:
    """Writes the weights of a model and the specification of its analytic layers, in the safetensors format.

    The file holds ``model.state_dict()``, which any reader of safetensors can load, and one metadata entry in JSON,
    without the option ``compute``, which changes no output. Equal models and ``info`` give equal bytes. An existing
    file is replaced only once the new one is complete.

    Args:
        model: any network, analytic or plain.
        file: the path; its folder must exist.
        info: anything that JSON can express, such as hyperparameters; ``read_info`` returns it.

    Raises:
        ValueError: if ``info`` is not JSON, or the state dict has entries that are not dense tensors with values.
        OSError: if the file cannot be written.

    Example:
        >>> import tempfile
        >>> net = nn.Sequential(AnalyticConv2d(3, 8, 5, arrangement="G12 P12"))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(net, f"{folder}/net.safetensors", info={"epochs": 10})
        ...     plain = nn.Sequential(nn.Conv2d(3, 8, 5))
        ...     load(plain, f"{folder}/net.safetensors")[0].arrangement.counts
        {'G': 12, 'P': 12}
    """
    path, content = Path(file), serialize(model, info)
    if path.exists() and not path.is_file():  # a device or a pipe
        path.write_bytes(content)
        return
    path = Path(os.path.realpath(path))  # a symbolic link stays
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        with suppress(OSError):
            temporary.unlink()


def serialize(model: nn.Module, info: Any = None) -> bytes:
    """The content of the file that ``save`` writes, with its arguments and ValueErrors."""
    layers = {
        name: _describe_convolution(module) | _describe_options(module) | {"learn": _list_trained_akps(module)}
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, AnalyticConv2d)
    }
    description = {"format": FORMAT, "info": info, "layers": layers}
    try:
        text = json.dumps(description, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"info must consist of what JSON can express: {error}") from error
    state = model.state_dict()
    for key, value in state.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"cannot save {key}: it is a {type(value).__name__}, not a tensor")
        if is_lazy(value) or value.is_meta:
            raise ValueError(f"cannot save {key}: it has no values yet")
        if value.layout != torch.strided:
            raise ValueError(f"cannot save {key}: it is sparse ({value.layout}); make it dense with to_dense()")
    # Copies, because safetensors rejects tensors that share memory.
    tensors = {key: value.detach().cpu().clone(memory_format=torch.contiguous_format) for key, value in state.items()}
    return serialize_tensors(tensors, {_METADATA_KEY: text})


def load(model: nn.Module, file: str | Path) -> nn.Module:
    """Loads a file written by ``save``, in place: restores the analytic layers, then all weights.

    Convolutions that are analytic in the file are replaced, as by ``acl.convert``: device, dtype, memory format,
    training mode and hooks are kept. Layers that are analytic already must have the saved specification; they keep
    their own choice of which AKPs are trained. Values are cast to the dtype of the model. The file may have been saved
    from a wrapper (DistributedDataParallel, torch.compile, AveragedModel) of such a model.

    Args:
        model: the plain network, or the network converted with the same specification.
        file: a file written by ``save``.

    Returns:
        The model, or the new layer if the model is a single convolution.

    Raises:
        ValueError: if the file cannot be read, was not written by ``save``, or does not match the model. The model
            is then unchanged.
    """
    description, state = _read(file)
    specifications, state = _remove_wrappers(description["layers"], state, model)
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, module in modules.items():
        if isinstance(module, AnalyticConv2d) and name not in specifications:
            raise ValueError(f"{file}: layer '{name}' is plain or missing in the file, but analytic in the model")
    replacements: dict[nn.Conv2d, AnalyticConv2d] = {}
    for name, specification in specifications.items():
        conv = modules.get(name)
        if not isinstance(conv, nn.Conv2d):
            actual = "missing" if conv is None else f"of type {type(conv).__name__}"
            raise ValueError(f"{file}: layer '{name}' is a convolution in the file, but {actual} in the model")
        try:
            _check_agreement(specification, _describe_convolution(conv))
            analytic = conv if isinstance(conv, AnalyticConv2d) else replacements.get(conv)
            if analytic is None:
                check_convertible(conv, name)
            else:
                _check_agreement(specification, _describe_options(analytic))
            layer = _create_layer(conv, specification, state.get(_join(name, "placement_bits")))
            if isinstance(conv, AnalyticConv2d) and conv.slot_kinds != layer.slot_kinds:
                raise ValueError("its kernels are in other slots in the file than in the model")
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(f"{file}: layer '{name}': {error}") from error
        if analytic is None:
            replacements[conv] = layer
    share_parameters(model, replacements)
    _check_state(state, _find_tensors_after(model, modules, replacements), file)
    model = replace_convolutions(model, replacements)
    model.load_state_dict(state)
    return model


def read_info(file: str | Path) -> dict[str, Any]:
    """Reads what a file written by ``save`` says about itself, without its weights.

    Returns:
        ``info``, the caller's; ``layers``, the specification of each analytic layer by name; and ``format``, the
        version of the format.

    Raises:
        ValueError: if the file cannot be read or was not written by ``save``.
    """
    return _read(file, with_tensors=False)[0]


def _read(file: str | Path, with_tensors: bool = True) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Returns the description and the state dict in a file."""
    try:
        with safe_open(file, "pt") as content:
            text = (content.metadata() or {}).get(_METADATA_KEY)
            state = {key: content.get_tensor(key) for key in (content.keys() if with_tensors else ())}
    except OSError as error:
        raise ValueError(f"cannot read {file}: {' '.join(str(error).split())}") from error
    except SafetensorError as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"cannot read {file}: it is no complete safetensors file, as acl.save writes ({reason})"
        ) from error
    if text is None:
        raise ValueError(f"{file} does not describe its layers; read a plain state dict with load_state_dict")
    try:
        description = json.loads(text)
        version, layers, _ = description["format"], description["layers"], description["info"]
        if version != FORMAT:
            raise ValueError(f"its format is {version!r}, and this version of acl reads format {FORMAT}")
        for name, specification in layers.items():
            layers[name] = {**_OPTIONS, **specification}  # files lack the options that came later
            if layers[name].keys() != _FIELDS:
                raise ValueError(f"layer '{name}' lacks a field or has an unknown one")
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"cannot read the description of the layers in {file}: {error}") from error
    return description, state


def _remove_wrappers(
    specifications: dict[str, dict[str, Any]], state: dict[str, Tensor], model: nn.Module
) -> tuple[dict[str, dict[str, Any]], dict[str, Tensor]]:
    """Removes the prefixes of wrappers that the model does not have from the names of layers and tensors."""
    own = model.state_dict().keys()
    for prefix in _WRAPPER_PREFIXES * 2:  # they can be nested in any order
        wrapped = {key: value for key, value in state.items() if key != "n_averaged"}  # the counter of AveragedModel
        if all(key.startswith(prefix) for key in wrapped) and not any(key.startswith(prefix) for key in own):
            state = {key.removeprefix(prefix): value for key, value in wrapped.items()}
            specifications = {
                f"{name}.".removeprefix(prefix).removesuffix("."): values for name, values in specifications.items()
            }
    return specifications, state


def _describe_convolution(conv: nn.Conv2d) -> dict[str, Any]:
    """What an analytic layer has in common with the convolution that it replaces."""
    original = conv.host if isinstance(conv, AnalyticConv2d) else conv
    values = get_convolution_arguments(conv)
    return {
        "class": type(original).__name__ if original is not None else nn.Conv2d.__name__,
        **{name: list(value) if isinstance(value, tuple) else value for name, value in values.items()},
    }


def _describe_options(layer: AnalyticConv2d) -> dict[str, Any]:
    """What determines an analytic layer's kernels, apart from its weights."""
    return {
        "arrangement": str(layer.arrangement),
        "has_placement": layer.placement is not None,
        **{name: getattr(layer.options, name) for name in _OPTIONS},
    }


def _list_trained_akps(layer: AnalyticConv2d) -> list[str]:
    return [key for key, parameter in layer.raw.items() if parameter.requires_grad]


def _create_layer(conv: nn.Conv2d, specification: Mapping[str, Any], bits: Tensor | None) -> AnalyticConv2d:
    """Creates the analytic layer of a specification, with the shape of ``conv``. Raises if it has invalid content."""
    if specification["has_placement"] != (bits is not None):
        raise ValueError("the placement of its kernels is missing or invalid")
    placement = None if bits is None else decode_placement(bits)
    options: Any = {name: specification[name] for name in _OPTIONS}
    layer = create_analytic(conv, specification["arrangement"], placement, **options)
    for key, parameter in layer.raw.items():
        parameter.requires_grad_(key in specification["learn"])
    _check_agreement(specification, _describe_options(layer) | {"learn": _list_trained_akps(layer)})
    return layer


def _check_agreement(specification: Mapping[str, Any], actual: Mapping[str, Any]) -> None:
    for name, value in actual.items():
        if specification[name] != value:
            raise ValueError(f"{name} is {specification[name]!r} in the file, but {value!r} in the model")


def _join(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key


def _find_tensors_after(
    model: nn.Module, modules: Mapping[str, nn.Module], replacements: Mapping[Any, AnalyticConv2d]
) -> dict[str, Tensor]:
    """The tensors of the model's state dict by key, as they will be once its convolutions are replaced."""
    tensors: dict[str, Tensor] = dict(model.state_dict(keep_vars=True))
    for name, conv in modules.items():
        if conv not in replacements:
            continue
        for key in conv.state_dict():
            tensor = tensors.pop(_join(name, key))
            if key not in ("weight", "bias") and type(conv) is not nn.Conv2d:
                tensors[_join(name, f"host.{key}")] = tensor
        layer_state = replacements[conv].state_dict(keep_vars=True)
        tensors |= {_join(name, key): tensor for key, tensor in layer_state.items()}
    return tensors


def _check_state(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], file: str | Path) -> None:
    """Raises ValueError unless the state dict can be loaded into the expected tensors without loss."""
    names_of_tensor: dict[int, list[str]] = {}
    for key, tensor in expected.items():
        if key not in state:
            raise ValueError(f"{file} has no tensor '{key}', but the model does")
        if tensor.is_meta:
            raise ValueError(f"cannot load {file}: '{key}' is on the meta device; call to_empty on the model first")
        if not is_lazy(tensor) and state[key].shape != tensor.shape:
            shapes = f"{tuple(state[key].shape)} in the file, but {tuple(tensor.shape)} in the model"
            raise ValueError(f"{file}: tensor '{key}' is {shapes}")
        names_of_tensor.setdefault(id(tensor), []).append(key)
    if unknown := [key for key in state if key not in expected]:
        raise ValueError(f"{file} has a tensor '{unknown[0]}', but the model has none")
    for first, *others in names_of_tensor.values():
        for other in others:
            if not torch.equal(*(state[key].flatten().view(torch.uint8) for key in (first, other))):
                raise ValueError(f"{file}: '{first}' and '{other}' are one tensor in the model, but differ in the file")
