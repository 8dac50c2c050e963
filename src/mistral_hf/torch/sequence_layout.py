"""Where the tokens of a forward pass stand: their positions, padding, packed sequences, and cached keys.

Legend: B batch, S new tokens, T keys, N packed sequences in a row.
"""

from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.cache_utils import Cache
from transformers.generation.continuous_batching.cache import PagedAttentionCache

from .cache import RollingCache
from .tracing import has_values, on_host, reads_freely


def layer_kind(window: int | None) -> str:
    """The library's name of a layer that has this window."""
    return "full_attention" if window is None else "sliding_attention"


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
    def of(cls, cache: Cache | None, length: int, layer_idx: int = 0) -> "KeyLayout":
        """The keys that `cache` will return for `length` new tokens; those of the tokens themselves without a cache."""
        if cache is None or isinstance(cache, PagedAttentionCache):
            return cls(0, 0, length)
        if not isinstance(cache, Cache):
            raise ValueError(
                f"The cache is a {type(cache).__name__} and must be a Cache, not a tuple of keys and values as in"
                " old releases: pass RollingCache(model.config), or DynamicCache(pairs) with a pair of each layer."
            )
        query_start = cache.get_seq_length(layer_idx)
        total, key_start = cache.get_mask_sizes(length, layer_idx)
        slots = cache.ring_slots(length, layer_idx) if isinstance(cache, RollingCache) else 0
        if isinstance(query_start, Tensor) and length > 1 and slots == 0:
            if isinstance(cache, RollingCache):  # a fresh static one
                query_start = 0
            elif has_values(query_start):
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


# Whether the padding that a cache was filled with lies on the left only, where the host knows it.
_left_only: WeakKeyDictionary[Cache, bool] = WeakKeyDictionary()


class Packing(NamedTuple):
    """Sequences that share rows and do not see each other.

    Attributes:
        segments: ``[B, S]``, the number of the sequence that a token belongs to.
        bounds: ``[N + 1]`` int32, where each sequence begins among all ``B * S`` tokens, and where the last ends; None
            where the host must not or cannot count them.
        longest: At least the number of tokens of every sequence, where the host knows it.
    """

    segments: Tensor
    bounds: Tensor | None = None
    longest: int | None = None


class SequenceLayout(NamedTuple):
    """Where each new token of a forward pass stands.

    Attributes:
        keys: Which tokens the keys of its attention calls are.
        positions: ``[B or 1, S]``. By default, the first real token of a row has position 0.
        padding: ``[B, total]``, True for real tokens, or None if all are.
        packing: The sequences that share rows, or None if there are none (while compiling, also given where a row may
            have only one).
        custom_mask: A mask given by the caller in place of ``[B, total]``, for the attention function as it is.
        paged: Whether the keys lie in the paged cache of continuous batching, whose kernels need no mask.
        padding_on_host: The mask ``[B, total]`` in host memory, if the host has read it.
        cache: The cache of the keys.
    """

    keys: KeyLayout
    positions: Tensor
    padding: Tensor | None = None
    packing: Packing | None = None
    custom_mask: Any = None
    paged: bool = False
    padding_on_host: Tensor | None = None
    cache: Cache | None = None

    @classmethod
    def of(
        cls,
        inputs_embeds: Tensor,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        *,
        packed: bool | None = None,
        **kwargs: Any,
    ) -> "SequenceLayout":
        """The layout of a call of the model.

        The host waits for an accelerator at most once, in a call of several tokens a row with a mask or positions.

        Args:
            inputs_embeds: ``[B, S, *]``, for its batch, length and device.
            attention_mask, position_ids, cache: As of the model.
            packed: False if rows are known to hold one sequence each, whatever their positions.
            **kwargs: As of the model. Sequences that are packed are marked by ``cu_seq_lens_q`` ``[N + 1]``, the bounds
                of N of them in one row, with ``max_length_q`` for the longest; or by ``seq_idx`` ``[B or 1, S]``, their
                numbers; or by positions that restart.

        Raises:
            ValueError: The mask does not cover the tokens, or lets packed sequences see each other; or the marks of
                packed sequences do not fit the rows, or come with a cache.
        """
        length = inputs_embeds.shape[1]
        keys = KeyLayout.of(cache, length)
        paged = isinstance(cache, PagedAttentionCache)
        custom = attention_mask is not None and (not isinstance(attention_mask, Tensor) or attention_mask.ndim == 4)
        padding = on_host = packing = None
        if attention_mask is not None and not custom:
            padding, on_host = _padding(attention_mask, position_ids, keys.query_start, inputs_embeds, packed)
        if not paged:
            packing = _marked_packing(inputs_embeds, cache, **kwargs)
        if packing is None and packed is not False and attention_mask is None and cache is None:
            packing = _packing_by_positions(position_ids, inputs_embeds)
        if position_ids is None:
            if packing is None:
                position_ids = _positions(inputs_embeds, attention_mask, cache)
            else:
                position_ids = _restarting_positions(packing.segments)
        custom_mask = attention_mask if custom else None
        return cls(keys, position_ids, padding, packing, custom_mask, paged, on_host, cache)

    def for_layer(self, layer_idx: int, window: int | None, cache: Cache | None) -> "SequenceLayout":
        """The same with the keys of a layer, and of the caller's masks that of its kind, where they differ by kind."""
        keys = KeyLayout.of(cache, self.positions.shape[1], layer_idx) if layer_idx else self.keys
        mask = self.custom_mask
        if isinstance(mask, dict):
            mask = mask[layer_kind(window)]
        return self._replace(keys=keys, custom_mask=mask)

    @property
    def segments(self) -> Tensor | None:
        """``[B, S]``, the number of the packed sequence that a token belongs to, or None if none are packed."""
        return None if self.packing is None else self.packing.segments

    @property
    def is_packed(self) -> bool:
        """Whether rows are known to hold several sequences, which a cache could not continue."""
        return self.packing is not None and not torch.compiler.is_compiling()

    def remember_padding(self, cache: Cache | None) -> None:
        """Let later steps know whether this call's padding lies on the left only, so that they need not wait for it."""
        if cache is not None and self.padding_on_host is not None and not reads_freely(self.positions):
            _left_only[cache] = _is_left_only(self.padding_on_host)

    def is_left_padded(self) -> bool:
        """Whether no padding follows a real token of its row.

        The host reads the mask where no earlier call with the same cache did.
        """
        if self.padding is None or not has_values(self.padding):
            return True
        if self.padding_on_host is not None:
            return _is_left_only(self.padding_on_host)
        if reads_freely(self.padding) or self.cache is None:
            return _is_left_only(*on_host(self.padding))
        if self.cache not in _left_only:
            _left_only[self.cache] = _is_left_only(*on_host(self.padding))
        return _left_only[self.cache]


def _is_left_only(real: Tensor) -> bool:
    return not bool((real[:, :-1] & ~real[:, 1:]).any())


def _padding(
    attention_mask: Tensor, position_ids: Tensor | None, start: Any, inputs_embeds: Tensor, packed: bool | None
) -> tuple[Tensor | None, Tensor | None]:
    """The boolean form of a 2-d mask on the model's device, None if it masks no token; and in host memory, if read."""
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
    if not has_values(real) or not (reads_freely(real) or length > 1):  # a decoding step must not wait
        return real, None
    may_restart = packed is not False and length > 1 and covered == length
    if position_ids is not None and may_restart and has_values(position_ids):
        host, positions = on_host(real, position_ids.to(device).expand(real.shape))
        host = host.bool()
        _check_one_sequence(positions, host)
    else:
        (host,) = on_host(real)
    return (None if host.all() else real), host


def _positions(inputs_embeds: Tensor, attention_mask: Any, cache: Cache | None) -> Tensor:
    """Positions of the new tokens, ``[B or 1, S]``: the first real token of a row has position 0."""
    length, device = inputs_embeds.shape[1], inputs_embeds.device
    if isinstance(attention_mask, Tensor) and attention_mask.ndim == 2:
        before = attention_mask.to(device).ne(0).int().argmax(dim=-1, keepdim=True)
        start = attention_mask.shape[1] - length
        return (torch.arange(start, start + length, device=device) - before).clamp(min=0)
    start = 0 if cache is None else cache.get_seq_length()
    return (torch.arange(length, device=device) + start)[None]


def starts_of_sequences(
    batch: int,
    length: int,
    position_ids: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    seq_idx: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """True ``[B or 1, S]`` where a packed sequence begins after another, or None where nothing marks packed sequences.

    Arguments as of the model; without a mask, positions that restart mark a new sequence.

    Raises:
        ValueError: The marks do not fit the rows.
    """
    if cu_seq_lens_q is not None:
        _check_bounds(cu_seq_lens_q, batch, length)
        starts = torch.zeros(length + 1, dtype=torch.bool, device=cu_seq_lens_q.device)
        starts = starts.index_fill(0, cu_seq_lens_q[1:].long(), True)
        return starts[None, :length]
    if seq_idx is not None:
        if seq_idx.ndim != 2 or seq_idx.shape[1] != length or seq_idx.shape[0] not in (1, batch):
            raise ValueError(
                f"seq_idx has shape {tuple(seq_idx.shape)}; for {batch} rows of {length} tokens it must be"
                f" [{batch}, {length}], the number of each token's sequence."
            )
        return F.pad(seq_idx.diff(dim=-1) != 0, (1, 0))
    if position_ids is None or position_ids.shape[-1] != length:
        return None
    return F.pad(position_ids.diff(dim=-1) != 1, (1, 0))


def _check_bounds(bounds: Tensor, batch: int, length: int) -> None:
    if batch != 1:
        raise ValueError(f"cu_seq_lens_q gives the bounds of sequences in one row, but there are {batch} rows.")
    if not (has_values(bounds) and reads_freely(bounds)):
        return
    if bounds[0] != 0 or bounds[-1] != length or (bounds.diff() < 0).any():
        raise ValueError(
            f"cu_seq_lens_q must rise from 0 to the {length} tokens of the row, but is {bounds.tolist()}: pass where"
            " each sequence begins, and where the last ends."
        )


def _marked_packing(
    inputs_embeds: Tensor,
    cache: Cache | None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    seq_idx: Tensor | None = None,
    **kwargs: Any,
) -> Packing | None:
    """The packing that keywords mark, for which the host need not wait; None if there are no such keywords."""
    if cu_seq_lens_q is None and seq_idx is None:
        return None
    batch, length = inputs_embeds.shape[:2]
    if cu_seq_lens_q is not None and len(cu_seq_lens_q) == 2:
        _check_bounds(cu_seq_lens_q, batch, length)
        return None
    if cache is not None:
        raise ValueError(
            f"{'seq_idx' if cu_seq_lens_q is None else 'cu_seq_lens_q'} marks packed sequences, which cannot continue"
            " those of a cache: pass no cache, or one sequence in each row."
        )
    starts = starts_of_sequences(batch, length, None, cu_seq_lens_q, seq_idx)
    assert starts is not None
    segments = starts.to(inputs_embeds.device).cumsum(dim=-1).expand(batch, -1)
    if cu_seq_lens_q is None:
        return Packing(segments)
    longest = max_length_q if isinstance(max_length_q, int) else None
    return Packing(segments, cu_seq_lens_q.to(device=inputs_embeds.device, dtype=torch.int32), longest)


def _packing_by_positions(position_ids: Tensor | None, inputs_embeds: Tensor) -> Packing | None:
    """The packing that positions mark by restarting, or None if no row holds more than one sequence."""
    batch, length = inputs_embeds.shape[:2]
    if position_ids is None or length == 1:
        return None
    starts = starts_of_sequences(batch, length, position_ids)
    if starts is None:
        return None
    segments = starts.cumsum(dim=-1).expand(batch, -1)
    if not has_values(starts):
        return Packing(segments)
    (host,) = on_host(starts)
    if not host.any():
        return None
    return Packing(segments, *bounds_of(host.expand(batch, -1), inputs_embeds.device))


def bounds_of(starts: Tensor, device: torch.device) -> tuple[Tensor, int]:
    """Bounds ``[N + 1]`` and greatest length of packed sequences, from their starts ``[B, S]`` in host memory."""
    begins = F.pad(starts[:, 1:], (1, 0), value=True).flatten().nonzero()[:, 0]
    bounds = F.pad(begins, (0, 1), value=starts.numel())
    return bounds.int().to(device, non_blocking=True), int(bounds.diff().max())


def _restarting_positions(segments: Tensor) -> Tensor:
    """Positions ``[B, S]`` of tokens within their packed sequences."""
    indices = torch.arange(segments.shape[1], device=segments.device).expand_as(segments)
    starts = F.pad(segments.diff(dim=-1) != 0, (1, 0))
    return indices - indices.masked_fill(~starts, 0).cummax(dim=-1).values


def _check_one_sequence(position_ids: Tensor, real: Tensor) -> None:
    """Under a 2-d mask, all real tokens of a row see each other, so their positions must not restart."""
    positions = position_ids.masked_fill(~real, -1)
    restarts = real[:, 1:] & (positions[:, 1:] <= positions.cummax(dim=-1).values[:, :-1])
    if restarts.any():
        row, index = restarts.nonzero()[0].tolist()
        raise ValueError(
            f"position_ids[{row}, {index + 1}] restarts at {positions[row, index + 1].item()}, as in packed sequences,"
            " but the attention_mask lets these see each other. Pack without an attention_mask"
            " (DataCollatorWithFlattening, or TRL's packing and padding_free), or leave out position_ids if a row is"
            " one sequence."
        )
