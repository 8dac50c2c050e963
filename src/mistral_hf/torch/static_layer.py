"""One layer of the key/value cache with fixed addresses and shapes, for compiled decoding.

Legend: B batch, K key/value heads, N new tokens, D head_dim, W window.
"""

from typing import Any

import torch
from torch import Tensor, nn

from .rolling_layer import RingLayer


class StaticRollingLayer(RingLayer):
    """A `RollingLayer` of fixed addresses and shapes, whose step is one graph before, at and after the wrap.

    Its length is a tensor. One query attends to all slots, the empty ones masked; several attend to all slots and
    then to the new tokens, except in the first call after a reset, which sees the new tokens alone.

    Args:
        max_cache_len: Number of tokens that the layer must hold.
        sliding_window: W, in tokens, or None for full attention.
        shown: Tokens that `keys` and `values` have room for, those that are missing being zeros (default:
            `max_cache_len`).
        all_slots: Let the first tokens attend to all slots as well, as attention weights of the length of the cache
            need.
    """

    is_compileable = True

    def __init__(
        self,
        max_cache_len: int,
        sliding_window: int | None = None,
        shown: int | None = None,
        all_slots: bool = False,
    ) -> None:
        super().__init__()
        self.sliding_window = sliding_window
        self.is_sliding = sliding_window is not None
        self.max_cache_len = min(max_cache_len, sliding_window or max_cache_len)
        requested = shown or max_cache_len
        self.shown = min(requested, self.max_cache_len)
        self.is_croppable = requested <= self.max_cache_len  # no token will overwrite another
        self.wraps = sliding_window is not None and sliding_window <= max_cache_len
        self.all_slots = all_slots
        self.cumulative_length = torch.zeros((), dtype=torch.long)
        self.is_fresh = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate ``[B, K, slots, D]`` for the dtype, device, batch and heads of the given states."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.key_buffer = key_states.new_zeros((*key_states.shape[:2], self.max_cache_len, key_states.shape[3]))
        self.value_buffer = value_states.new_zeros((*value_states.shape[:2], self.max_cache_len, value_states.shape[3]))
        self.cumulative_length = self.cumulative_length.to(self.device)
        if not torch.compiler.is_compiling():
            for tensor in (self.key_buffer, self.value_buffer, self.cumulative_length):
                torch._dynamo.mark_static_address(tensor)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store ``[B, K, N, D]`` new states and return all slots; for N > 1 the old slots, then the new states."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        count = key_states.shape[2]
        if count > self.max_cache_len and not self.wraps:
            raise ValueError(f"{count} tokens do not fit a static cache of {self.max_cache_len}; raise max_cache_len.")
        if self._returns_slots(count):
            keys, values = self.key_buffer, self.value_buffer
        elif self.is_fresh:
            keys, values = key_states, value_states
        else:
            keys = torch.cat([self.key_buffer, key_states], dim=2)
            values = torch.cat([self.value_buffer, value_states], dim=2)
        kept = min(count, self.max_cache_len) if self.wraps else count
        slots = self.cumulative_length + torch.arange(count - kept, count, device=self.device)
        if self.wraps:
            slots = slots % self.max_cache_len
        self.key_buffer.index_copy_(2, slots, key_states[:, :, count - kept :])
        self.value_buffer.index_copy_(2, slots, value_states[:, :, count - kept :])
        self.cumulative_length.add_(count)
        self.is_fresh = False
        return keys, values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Number of keys that `update` will return, and the position of the first chronological one (0 if none)."""
        if self._returns_slots(query_length):
            return self.max_cache_len, 0
        return (query_length if self.is_fresh else self.max_cache_len + query_length), 0

    def ring_slots(self, query_length: int) -> int:
        """Number of leading keys that `update` will return in slot order."""
        return 0 if self.is_fresh and not self._returns_slots(query_length) else self.max_cache_len

    def _returns_slots(self, count: int) -> bool:
        """Whether `update` returns the buffer itself."""
        return count == 1 or (self.is_fresh and self.all_slots and count <= self.max_cache_len)

    def get_seq_length(self) -> Tensor | int:
        """Number of tokens so far, as a 0-d tensor once the buffer is allocated."""
        return self.cumulative_length if self.is_initialized else 0

    def get_max_length(self) -> int:
        """Number of slots."""
        return self.max_cache_len

    def reset(self) -> None:
        """Forget all tokens; addresses stay."""
        if self.is_initialized:
            self.key_buffer.zero_()
            self.value_buffer.zero_()
        self.cumulative_length.zero_()
        self.is_fresh = True

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Put the rows of the batch in the order `beam_idx`, at the same addresses."""
        if self.is_initialized:
            self.key_buffer.copy_(self.key_buffer.index_select(0, beam_idx.to(self.device)))
            self.value_buffer.copy_(self.value_buffer.index_select(0, beam_idx.to(self.device)))

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` tokens (the argument is zero or negative).

        Raises:
            ValueError: The argument is positive, exceeds what is stored, or needs tokens that are overwritten.
        """
        count, length = -int(tokens_to_remove), int(self.cumulative_length)
        if not 0 <= count <= length:
            raise ValueError(
                f"crop({tokens_to_remove}) is not possible with {length} tokens stored: pass zero, or the number of"
                " tokens to remove as a negative number, at most as many as are stored."
            )
        if count and length > self.max_cache_len:
            raise ValueError(
                f"crop({tokens_to_remove}): a static cache cannot restore tokens that were overwritten at its window of"
                f" {self.sliding_window}. Use the default cache for assisted decoding, or reset() to forget everything."
            )
        self.cumulative_length.sub_(count)

    def stored(self) -> tuple[Tensor, Tensor]:
        """Keys and values of every token that the buffer holds, oldest first."""
        return self._tokens(self.key_buffer), self._tokens(self.value_buffer)

    def restore(self, keys: Tensor, values: Tensor, length: int) -> None:
        """Fill an empty layer with what `stored` returned after `length` tokens."""
        self.lazy_initialization(keys, values)
        self.cumulative_length.fill_(length - keys.shape[2])
        self.update(keys, values)

    def _tokens(self, buffer: Tensor) -> Tensor:
        end = int(self.cumulative_length)
        order = torch.arange(end - min(end, self.max_cache_len), end, device=buffer.device) % self.max_cache_len
        return buffer.index_select(2, order)

    def _read(self, buffer: Tensor) -> Tensor:
        tokens = self._tokens(buffer)
        return nn.functional.pad(tokens, (0, 0, 0, max(0, self.shown - tokens.shape[2])))

    def _replaced(self, buffer: Tensor | None, states: Tensor) -> Tensor:
        raise ValueError(
            "The buffers of a static cache have fixed addresses and cannot be assigned: use the default cache, or write"
            " into key_buffer and value_buffer in place."
        )
