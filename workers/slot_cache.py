"""transformers' language models over slots: a cache whose rows are fixed buffers, each at a position of its own.

`SlotCache` is what a model takes as its cache, `attend` and `slot_mask` are what it calls to read from it, registered
under `ATTENTION`. Which positions a layer sees (all, a window, a chunk) is the architecture's own mask function,
evaluated at each row's positions. Knows no queue and no model.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, Cache

from fettle.manifest import DecoderSpec

ATTENTION = "fettle_slots"
# On CPU a call for each row, which reads what the row sees, is taken where one for all reads so many times more. A call
# costs as much as to read so many positions.
WORTH = 1.5
CALL = 128

# What is added to the scores, [rows, 1, tokens, seen], 0 or minus infinity; the positions that each row's one token
# sees; or None, where all see all.
Sight = Tensor | list[range] | None


def register() -> None:
    """Make `ATTENTION` known to transformers."""
    AttentionInterface.register(ATTENTION, attend)
    AttentionMaskInterface.register(ATTENTION, slot_mask)


@dataclass(frozen=True, slots=True)
class Call:
    """What one forward pass reads and writes.

    Attributes:
        first, rows: row r reads slot first + r...
        seen: ...of which the first so many positions, as far as its mask lets it.
        targets: int64 [rows], the slot that each row's new tokens go to.
        positions: int64 [rows, tokens], where; ascending by one.
    """

    first: int
    rows: int
    seen: int
    targets: Tensor
    positions: Tensor


class SlotCache(Cache):  # type: ignore[misc]
    """Keys and values, a buffer of [slots, kv_heads, context, head_dim] each for every layer; nothing at first.

    Attributes:
        sound: bool [rows], whether the last pass gave numbers; what a row wrote otherwise must not stay.
    """

    def __init__(self, spec: DecoderSpec, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(layers=[])
        self.slots = 0
        self.context = 0
        self.bytes_per_token = spec.kv_floats_per_token * dtype.itemsize
        self.sound = torch.ones(0, dtype=torch.bool, device=device)
        self._spec = spec
        self._dtype = dtype
        self._device = device
        self._keys, self._values = ([self._zeros(0, 0) for _ in range(spec.layers)] for _ in range(2))
        self._call: Call | None = None

    def resize(self, slots: int, context: int) -> None:
        """What both the old and the new shape hold is kept. One layer at a time has its memory twice."""
        kept = np.s_[: min(slots, self.slots), :, : min(context, self.context)]
        for buffers in (self._keys, self._values):
            for layer, old in enumerate(buffers):
                new = self._zeros(slots, context)
                new[kept] = old[kept]
                buffers[layer] = new
        self.slots, self.context = slots, context

    def copy(self, source: int, target: int, length: int) -> None:
        """Give the target slot the source's first `length` positions."""
        for buffer in (*self._keys, *self._values):
            buffer[target, :, :length] = buffer[source, :, :length]

    def aim(self, call: Call) -> None:
        """The next forward pass is this one."""
        self._call = call

    def wipe(self, call: Call, rows: Tensor) -> None:
        """Zero what these rows (bool [rows]) of a pass wrote: a masked position weighs nothing, but 0 * nan is nan."""
        where = (call.targets[rows][:, None], slice(None), call.positions[rows])
        for buffer in (*self._keys, *self._values):
            buffer[where] = 0

    def _zeros(self, slots: int, context: int) -> Tensor:
        shape = (slots, self._spec.kv_heads, context, self._spec.head_dim)
        if self._device.type != "cpu":
            return torch.zeros(shape, dtype=self._dtype, device=self._device)
        # numpy's zeros are pages that the system provides when they are first written; torch's are written at once.
        size = math.prod(shape)
        held = np.zeros((size + 1) * self._dtype.itemsize, np.uint8)
        return torch.from_numpy(held).view(self._dtype)[:size].view(shape)

    # What transformers calls.

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write the new keys and values [rows, kv_heads, tokens, head_dim]; what is there to read afterwards."""
        del args, kwargs
        call = self._aimed
        keys, values = self._keys[layer_idx], self._values[layer_idx]
        where = (call.targets[:, None], slice(None), call.positions)
        keys[where] = key_states.transpose(1, 2)
        values[where] = value_states.transpose(1, 2)
        if layer_idx == self._spec.layers - 1:
            # What is no number in an earlier layer is none here.
            finite = torch.isfinite(key_states) & torch.isfinite(value_states)
            self.sound = finite.flatten(1).all(dim=1)
        read = np.s_[call.first : call.first + call.rows, :, : call.seen]
        return keys[read], values[read]

    def get_query_offset(self, layer_idx: int = 0) -> Tensor:
        """int64 [rows]; transformers passes it on to `slot_mask`."""
        del layer_idx
        return self._aimed.positions[:, 0]

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        del query_length, layer_idx
        return self._aimed.seen, 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Of the longest row. Positions are told to the model, so that nothing hangs on it."""
        del layer_idx
        return self._aimed.seen - self._aimed.positions.shape[1]

    @property
    def _aimed(self) -> Call:
        if self._call is None:
            raise RuntimeError("the cache has not been told where the pass reads and writes")
        return self._call


def slot_mask(
    *,
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor,
    kv_offset: int,
    mask_function: Callable[..., Tensor],
    dtype: torch.dtype,
    device: torch.device | str,
    **kwargs: Any,
) -> Sight:
    """What each new token sees, for `attend`."""
    del kwargs
    rows = torch.arange(batch_size, device=device).view(-1, 1, 1, 1)
    heads = torch.zeros(1, 1, 1, 1, dtype=torch.int64, device=device)
    begin = q_offset.view(-1, 1) if isinstance(q_offset, Tensor) else q_offset
    queries = (begin + torch.arange(q_length, device=device)).view(-1, 1, q_length, 1)
    keys = (kv_offset + torch.arange(kv_length, device=device)).view(1, 1, 1, -1)
    seen = mask_function(rows, heads, queries, keys).expand(batch_size, 1, q_length, kv_length)
    # To ask a CUDA device would be to wait for it.
    if seen.device.type == "cpu":
        if bool(seen.all()):
            return None
        ranges = _ranges(seen[:, 0, 0].numpy()) if q_length == 1 else None
        if ranges is not None:
            return ranges
    return torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen, -torch.inf)


def _ranges(seen: NDArray[np.bool_]) -> list[range] | None:
    """The positions that each row sees (bool [rows, positions]), if to read no others pays."""
    counts = seen.sum(axis=1)
    if seen.size <= WORTH * (counts.sum() + CALL * len(counts)):
        return None
    begins = seen.argmax(axis=1).tolist()
    ranges = [range(begin, begin + count) for begin, count in zip(begins, counts.tolist(), strict=True)]
    whole = all(row[each.start : each.stop].all() for row, each in zip(seen, ranges, strict=True))
    return ranges if whole else None


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Sight,
    scaling: float | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of [rows, heads, tokens, head_dim] to [rows, kv_heads, seen, head_dim].

    Returns [rows, tokens, heads, head_dim], and no weights.

    The heads that share keys are laid end to end as if they were more tokens, so that keys are not repeated for each.
    """
    del module, kwargs
    rows, heads, tokens, width = query.shape
    shared = heads // key.shape[1]
    query = query.reshape(rows, key.shape[1], shared * tokens, width)
    scaling = width**-0.5 if scaling is None else scaling
    if isinstance(attention_mask, list):
        parts = []
        for row, seen in enumerate(attention_mask):
            read = np.s_[row : row + 1, :, seen.start : seen.stop]
            parts.append(_attend(query[row : row + 1], key[read], value[read], None, scaling, softcap))
        output = torch.cat(parts)
    else:
        mask = attention_mask
        if mask is not None and tokens > 1:
            mask = mask.repeat(1, 1, shared, 1)
        output = _attend(query, key, value, mask, scaling, softcap)
    return output.reshape(rows, heads, tokens, -1).transpose(1, 2).contiguous(), None


def _attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, softcap: float | None
) -> Tensor:
    """With `softcap`, scores are kept below it by a tanh, which no kernel of torch knows."""
    if not softcap:
        return nn.functional.scaled_dot_product_attention(query, key, value, mask, scale=scaling)
    scores = torch.tanh(query @ key.transpose(2, 3) * scaling / softcap) * softcap
    if mask is not None:
        scores = scores + mask
    return torch.softmax(scores, dim=-1, dtype=torch.float32).to(value.dtype) @ value
