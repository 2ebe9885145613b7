"""ComputedConv2d: a convolution whose weight is computed from other parameters, and when that weight is cached."""

import copy
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.func import functional_call

COMPUTED_WEIGHT = (
    "the weight of an analytic layer is computed from its AKPs and plain kernels, not stored as a parameter; "
    "acl.fold(model) makes its analytic layers plain convolutions, whose weight can be set, pruned or parametrized"
)
CONVOLUTION_FIELDS = (
    "in_channels",
    "out_channels",
    "kernel_size",
    "stride",
    "padding",
    "dilation",
    "groups",
    "padding_mode",
)


def get_convolution_arguments(conv: nn.Conv2d) -> dict[str, Any]:
    """The arguments of nn.Conv2d that create a convolution like this one, apart from device and dtype."""
    return {**{name: getattr(conv, name) for name in CONVOLUTION_FIELDS}, "bias": conv.bias is not None}


class _Parameters(dict[str, Any]):
    """The parameters of a layer, for tools that look for ``weight`` among them and would fail with a bare KeyError."""

    def __missing__(self, key: str) -> Any:
        raise KeyError(COMPUTED_WEIGHT if key == "weight" else key)

    def __delitem__(self, key: str) -> None:
        self[key]  # raises the error of __missing__
        super().__delitem__(key)


class ComputedConv2d(nn.Conv2d):
    """An nn.Conv2d whose weight is computed.

    In training mode, each forward pass computes the weight. In eval mode, the weight is cached until what determines it
    changes. A subclass implements ``_synthesize`` and ``_get_sources``, and takes the arguments of nn.Conv2d.
    """

    kernel_size: tuple[int, int]
    host: nn.Conv2d | None
    """The replaced convolution if its class is a subclass of nn.Conv2d; it then performs the convolution."""
    _format: Tensor
    """Module.to() applies a memory format to every 4-D tensor, so this buffer records the one the weight should use."""
    _cache: tuple[tuple[Any, ...], list[Tensor], Tensor] | None
    """The structure and the parameters that the cached tensor was computed from, and that tensor, mostly the weight."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        weight = self._parameters["weight"]
        assert weight is not None
        self.register_buffer("_format", weight.new_zeros(1, 2, 2, 2), persistent=False)
        del self.weight  # replaced by the property below
        self._parameters = _Parameters(self._parameters)
        self.host = None
        self._cache = None

    def _synthesize(self) -> Tensor:
        """Computes the weight, (out_channels, in_channels / groups, kh, kw), differentiable in every parameter."""
        raise NotImplementedError

    def _get_sources(self) -> tuple[Sequence[Tensor | None], Hashable]:
        """The parameters that determine the weight (None for one that is computed itself), and everything else."""
        raise NotImplementedError

    @property
    def weight(self) -> Tensor:  # type: ignore[override] # a parameter in nn.Conv2d, computed here
        """(out_channels, in_channels / groups, kh, kw), differentiable in every parameter that it is computed from."""
        weight = self._read_cache_or_compute(self._synthesize)
        # A copy, so that editing it in place does not change the layer.
        return weight.clone() if self._cache is not None and weight is self._cache[2] else weight

    def _read_cache_or_compute(self, compute: Callable[[], Tensor]) -> Tensor:
        """What one of the layer's methods computes, or its cached result, which must not be edited."""
        sources, structure = self._get_sources()
        needs_grad = torch.is_grad_enabled() and any(p is not None and p.requires_grad for p in sources)
        is_traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
        # What computes or replaces parameters (parametrizations, replicas, functional_call, fake tensors) cannot be
        # compared.
        is_comparable = all(type(p) is nn.Parameter and not p.is_meta for p in sources)
        if self.training or needs_grad or is_traced or not is_comparable:
            return compute()
        # Compare by value: edits through .data and fused optimizers leave no other trace, and a stale weight is wrong.
        vectors: Any = [p for p in sources if p is not None and p.ndim == 1]
        others: Any = [p for p in sources if p is not None and p.ndim != 1]
        compared = [torch.cat(vectors), *others] if vectors else others
        key = (compared[0].device, self._format.dtype, self._format.stride(), structure, compute.__name__)
        cache = self._cache
        if cache is None or cache[0] != key or not all(map(torch.equal, cache[1], compared)):
            with torch.inference_mode(False), torch.no_grad():
                cache = (key, [tensor.detach().clone() for tensor in compared], compute())
            self._cache = cache
        return cache[2]

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - nn.Conv2d's name
        if isinstance(input, torch.fx.Proxy):  # a leaf of the graph: fx cannot trace the synthesis
            return input.tracer.create_proxy("call_module", input.tracer.path_of_module(self), (input,), {})
        if self.host is not None:
            return self.convolve(input, self.weight, self.bias)  # a host's code could edit its weight
        return self._forward(input)

    def _forward(self, x: Tensor) -> Tensor:
        """The output of a layer without host."""
        return self.convolve(x, self._read_cache_or_compute(self._synthesize), self.bias)

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Performs the layer's convolution with the given weight and bias in place of its own."""
        if self.host is None:
            return self._conv_forward(x, weight, bias)
        tensors = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
        return functional_call(self.host, tensors, (x,))

    def fold(self) -> nn.Conv2d:
        """Creates an nn.Conv2d with the same weight, bias, device, dtype, memory format and training mode.

        Its weight is frozen if everything that it is computed from is.
        """
        if self.host is not None:
            conv = copy.deepcopy(self.host)
        else:
            conv = nn.Conv2d(**get_convolution_arguments(self), device="meta")
        with torch.enable_grad():
            weight = self.weight
        conv.weight = nn.Parameter(weight.detach().clone(), weight.requires_grad)
        if self.bias is not None:
            conv.bias = nn.Parameter(self.bias.detach().clone(), self.bias.requires_grad)
        return conv.train(self.training)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *lists: Any
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *lists)
        others = (f"{prefix}bias", f"{prefix}host.")
        tensors = [
            tensor
            for name, tensor in state_dict.items()
            if name.startswith(prefix) and not name.startswith(others) and tensor.is_floating_point()
        ]
        if local_metadata.get("assign_to_params_buffers") and tensors:  # they replace the parameters
            self._format = torch.empty_like(self._format, device=tensors[0].device, dtype=tensors[0].dtype)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        if name.startswith("weight") and isinstance(self._parameters, _Parameters):
            raise TypeError(COMPUTED_WEIGHT)
        super().register_parameter(name, param)

    def __prepare_scriptable__(self) -> NoReturn:  # called by torch.jit.script
        raise TypeError(f"torch.jit.script cannot compile an analytic layer: {COMPUTED_WEIGHT}")

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_cache": None}
