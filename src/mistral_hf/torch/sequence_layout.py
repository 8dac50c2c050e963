"""Where the tokens of a forward pass stand: their positions, padding, packed sequences, and cached keys.

Legend: B batch, S new tokens, T keys, N packed sequences in a row.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.generation.continuous_batching.cache import PagedAttentionCache

from .cache import RollingCache
from .tracing import has_values


class KeyLayout(NamedTuple):
    """Which tokens the T keys of an attention call are.

    Queries and keys are numbered by their index in the sequence, padding included. The first `slots` keys lie in slot
    order, as a rolling buffer holds them; the others are consecutive.

    Attributes:
        query_start: Index of the first query (a 0-d tensor with a static cache).
        key_start: Index of the first consecutive key, if all are.
        length: T.
        slots: Number of leading keys in slot order.
        cached: Whether the keys are kept for later queries.
    """

    query_start: int | Tensor
    key_start: int
    length: int
    slots: int = 0
    cached: bool = False

    @classmethod
    def of(cls, cache: Cache | None, length: int) -> "KeyLayout":
        """The keys that `cache` will return for `length` new tokens; those of the tokens themselves without a cache."""
        if cache is None or isinstance(cache, PagedAttentionCache):
            return cls(0, 0, length)
        if not isinstance(cache, Cache):
            raise ValueError(
                f"The cache is a {type(cache).__name__} and must be a Cache, not a tuple of keys and values as in"
                " old releases: pass RollingCache(model.config), or DynamicCache(pairs) with a pair of each layer."
            )
        query_start = cache.get_seq_length()
        total, key_start = cache.get_mask_sizes(length, 0)
        slots = cache.ring_slots(length) if isinstance(cache, RollingCache) else 0
        if isinstance(query_start, Tensor) and length > 1 and slots == 0 and has_values(query_start):
            query_start = int(query_start)
        return cls(query_start, key_start, total, slots, cached=True)

    def indices(self, query_length: int, device: torch.device) -> Tensor:
        """Index of every key ``[T]``; a slot that was never filled gets one after all queries."""
        if self.slots == 0:
            return torch.arange(self.key_start, self.key_start + self.length, device=device)
        newest = self.query_start + query_length - 1 - (self.length - self.slots)
        ring = newest - (newest - torch.arange(self.slots, device=device)) % self.slots
        ring = torch.where(ring < 0, newest + query_length + 1, ring)
        consecutive = torch.arange(1, self.length - self.slots + 1, device=device) + newest
        return torch.cat([ring, consecutive])


class SequenceLayout(NamedTuple):
    """Where each new token of a forward pass stands.

    Attributes:
        keys: Which tokens the keys of its attention calls are.
        positions: ``[B or 1, S]``. By default, the first real token of a row has position 0.
        padding: ``[B, total]``, True for real tokens, or None if all are.
        segments: ``[B, S]``, the number of the packed sequence that a token belongs to, or None if there are no packed
            sequences (while compiling, also given where a row may have only one).
        custom_mask: A mask given by the caller in place of ``[B, total]``, for the attention function as it is.
        paged: Whether the keys lie in the paged cache of continuous batching, whose kernels need no mask.
    """

    keys: KeyLayout
    positions: Tensor
    padding: Tensor | None = None
    segments: Tensor | None = None
    custom_mask: Any = None
    paged: bool = False

    @classmethod
    def of(
        cls,
        inputs_embeds: Tensor,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        *,
        needs_positions: bool = False,
        packed: bool | None = None,
        **kwargs: Any,
    ) -> "SequenceLayout":
        """The layout of a call of the model.

        Args:
            inputs_embeds: ``[B, S, *]``, for its batch, length and device.
            attention_mask, position_ids, cache: As of the model.
            needs_positions: Whether packed sequences are told apart by their positions alone.
            packed: False if rows are known to hold one sequence each, whatever their positions.
            **kwargs: As of the model: ``cu_seq_lens_q`` ``[N + 1]``, the bounds of N sequences packed into one row,
                and ``seq_idx``.

        Raises:
            ValueError: The mask does not cover the tokens, or lets packed sequences see each other; or packed sequences
                have no positions.
        """
        batch, length = inputs_embeds.shape[:2]
        keys = KeyLayout.of(cache, length)
        if position_ids is None and needs_positions:
            _check_no_packing(kwargs)
        segments = None
        if packed is not False:
            segments = _packed_segments(position_ids, attention_mask, cache, batch)
        if segments is None and position_ids is None:
            segments = _segments_between(kwargs.get("cu_seq_lens_q"), inputs_embeds)
        custom = attention_mask is not None and (not isinstance(attention_mask, Tensor) or attention_mask.ndim == 4)
        padding = None if custom else _padding(attention_mask, keys.query_start, inputs_embeds)
        if position_ids is None:
            position_ids = _positions(inputs_embeds, attention_mask, cache)
        paged = isinstance(cache, PagedAttentionCache)
        return cls(keys, position_ids, padding, segments, attention_mask if custom else None, paged)

    @property
    def is_packed(self) -> bool:
        """Whether rows are known to hold several sequences, which a cache could not continue."""
        return self.segments is not None and not torch.compiler.is_compiling()


def _padding(attention_mask: Tensor | None, start: Any, inputs_embeds: Tensor) -> Tensor | None:
    """The boolean form of a 2-d mask, or None if it masks no token."""
    if attention_mask is None:
        return None
    (batch, length), device = inputs_embeds.shape[:2], inputs_embeds.device
    if attention_mask.ndim != 2 or attention_mask.shape[0] != batch:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}; for a batch of {batch} sequences it must be"
            f" [{batch}, tokens], or have 4 dimensions."
        )
    covered = attention_mask.shape[1]
    if isinstance(start, int) and covered != start + length:
        raise ValueError(
            f"attention_mask covers {covered} tokens, but there are {start} cached and {length} new ones: it must have"
            f" {start + length} columns, those of the cached tokens first."
        )
    real = attention_mask.to(device=device, dtype=torch.bool)
    may_wait = device.type == "cpu" or length > 1  # a decoding step must not wait for an accelerator
    if may_wait and has_values(real) and real.all():
        return None
    return real


def _positions(inputs_embeds: Tensor, attention_mask: Any, cache: Cache | None) -> Tensor:
    """Positions of the new tokens, ``[B or 1, S]``: the first real token of a row has position 0."""
    length, device = inputs_embeds.shape[1], inputs_embeds.device
    if isinstance(attention_mask, Tensor) and attention_mask.ndim == 2:
        before = attention_mask.to(device).ne(0).int().argmax(dim=-1, keepdim=True)
        start = attention_mask.shape[1] - length
        return (torch.arange(start, start + length, device=device) - before).clamp(min=0)
    start = 0 if cache is None else cache.get_seq_length()
    return (torch.arange(length, device=device) + start)[None]


def _packed_segments(
    position_ids: Tensor | None, attention_mask: Any, cache: Cache | None, batch: int
) -> Tensor | None:
    """Number of the packed sequence of every token, ``[B, S]``, or None if no row has more than one."""
    if position_ids is None or cache is not None or position_ids.shape[-1] == 1:
        return None
    if attention_mask is not None:
        if isinstance(attention_mask, Tensor) and attention_mask.shape == (batch, position_ids.shape[-1]):
            _check_one_sequence(position_ids, attention_mask.bool())
        return None
    segments = (position_ids.diff(dim=-1, prepend=position_ids[:, :1] - 1) != 1).cumsum(dim=-1)
    if has_values(segments) and not segments[:, -1].any():
        return None
    return segments.expand(batch, -1)


def _segments_between(bounds: Tensor | None, inputs_embeds: Tensor) -> Tensor | None:
    """The same from the bounds ``[N + 1]`` of N sequences in one row, for attention that needs no positions for it."""
    if bounds is None:
        return None
    batch, length = inputs_embeds.shape[:2]
    if batch != 1:
        raise ValueError(f"cu_seq_lens_q gives the bounds of sequences in one row, but there are {batch} rows.")
    return torch.bucketize(torch.arange(length, device=bounds.device), bounds[1:], right=True)[None]


def _check_no_packing(keywords: dict[str, Any]) -> None:
    """Masks can tell packed sequences apart only by positions that restart, not by other outputs of a collator."""
    for name in ("cu_seq_lens_q", "seq_idx"):
        if keywords.get(name) is not None:
            raise ValueError(
                f"{name} marks packed sequences, but there are no position_ids, without which they would see each"
                " other: let the collator return them (DataCollatorWithFlattening(return_position_ids=True))."
            )


def _check_one_sequence(position_ids: Tensor, real: Tensor) -> None:
    """Under a 2-d mask, all real tokens of a row see each other, so their positions must not restart."""
    if not (has_values(position_ids) and has_values(real)):
        return
    positions = position_ids.to(real.device).expand(real.shape).masked_fill(~real, -1)
    restarts = real[:, 1:] & (positions[:, 1:] <= positions.cummax(dim=-1).values[:, :-1])
    if restarts.any():
        row, index = restarts.nonzero()[0].tolist()
        raise ValueError(
            f"position_ids[{row}, {index + 1}] restarts at {positions[row, index + 1].item()}, as in packed sequences,"
            " but the attention_mask lets these see each other. Pack without an attention_mask"
            " (DataCollatorWithFlattening, or TRL's packing and padding_free), or leave out position_ids if a row is"
            " one sequence."
        )
