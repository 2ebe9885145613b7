"""SlottedConv2d: which slot of a computed weight holds which kernel of an arrangement."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from acl.arrangement import Arrangement, encode_placement
from acl.computed_conv import ComputedConv2d
from acl.kernels import KINDS
from acl.options import LayerOptions


class SlottedConv2d(ComputedConv2d):
    """A computed convolution whose slots, 2-D kernels or filters, are filled by an arrangement."""

    arrangement: Arrangement
    """The number of kernels or filters of each kind, as counts."""
    options: LayerOptions
    raw: nn.ParameterDict
    """The AKPs as stored, named ``<symbol>_<akp>``; ``akps()`` returns them in natural units."""
    plain: nn.Parameter | None
    """The plain kernels in slot order, (count, kh, kw), or plain filters, (count, in / groups, kh, kw), or None."""
    gains: nn.Parameter | None
    """(analytic filters, in / groups) in the arrangement's order; None in a kernel mosaic or without such filters."""
    placement: Tensor | None
    """(slots,) The index of each slot's kernel in the arrangement's order; no buffer, which averages would change."""

    def _fill_slots(self, arrangement: Arrangement, placement: Tensor | None) -> None:
        """Sets ``arrangement`` and ``placement``. Raises ValueError if they do not fit the layer."""
        self.arrangement = arrangement.fill(self.in_channels // self.groups, self.out_channels, per=self.options.per)
        num_slots = sum(self.arrangement.counts.values())
        if placement is not None and sorted(placement.tolist()) != list(range(num_slots)):
            raise ValueError(f"placement must be a permutation of the layer's {num_slots} slots")
        self.placement = None if placement is None else placement.detach().to("cpu", torch.long, copy=True)
        self._move_placement()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "SlottedConv2d":
        super()._apply(fn, recurse)
        self._move_placement()
        return self

    def _move_placement(self) -> None:
        if self.placement is not None and not self._format.is_meta:
            self.placement = self.placement.to(self._format.device)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.placement is not None:
            destination[f"{prefix}placement_bits"] = encode_placement(self.placement)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        key = f"{prefix}placement_bits"
        bits = state_dict.pop(key, None)  # of a copy
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        self._move_placement()
        if bits is None or self.placement is None:
            keys = missing_keys if bits is None else unexpected_keys
            keys += [key] if strict and (bits is None) != (self.placement is None) else []
        elif not torch.equal((bits > 0.5).cpu(), encode_placement(self.placement).cpu()):
            error_msgs.append(f"{key}: the state dict places its kernels in other slots than the layer does")

    @property
    def slot_kinds(self) -> list[str]:
        """The symbol of the kind in each slot."""
        kinds = [symbol for symbol, count in self.arrangement.counts.items() for _ in range(count)]
        return kinds if self.placement is None else [kinds[i] for i in self.placement.tolist()]

    def get_kind_of_slot(self, slot: int) -> str:
        """The symbol of the kind in a slot. Raises IndexError for a slot that the layer does not have."""
        kinds = self.slot_kinds
        if slot not in range(len(kinds)):
            raise IndexError(f"slot {slot} is out of range; the layer has slots 0 to {len(kinds) - 1}")
        return kinds[slot]

    def slots_of(self, symbol: str) -> list[int]:
        """The slot of each kernel of a kind, in the order of the kind's parameters."""
        kernels = self.arrangement.kernel_ranges[symbol]
        if self.placement is None:
            return list(kernels)
        slot_of_kernel = self.placement.argsort().tolist()
        return [slot_of_kernel[i] for i in kernels]

    def gain_rows(self, symbol: str) -> slice:
        """The rows of ``gains`` that belong to the filters of an analytic kind."""
        start = 0
        for other, count in self.arrangement.counts.items():
            if other == symbol:
                return slice(start, start + count)
            start += count if KINDS[other].is_analytic else 0
        raise KeyError(symbol)

    def view_slots(self, weight: Tensor) -> Tensor:
        """A weight of this layer's shape by slot: (slots, kh, kw), or (slots, in / groups, kh, kw) of filters."""
        return weight.flatten(0, 1) if self.options.per == "kernel" else weight

    def select_slots(self, is_selected: Tensor) -> Tensor:
        """The weight with all kernels set to zero but those in the selected slots, (slots,) bool."""
        weight = self.weight
        return weight * is_selected.to(weight.device).view(self.out_channels, -1, 1, 1)
