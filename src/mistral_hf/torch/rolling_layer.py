"""One layer of the key/value cache: a rolling buffer, written in place, whose memory is fixed by the window.

Legend: B batch, K key/value heads, N new tokens, D head_dim, W window.

A token at position p lives in slot ``p % slots`` of a buffer ``[B, K, slots, D]``. With W=4, a prompt of six tokens and
one decoding step:

    prompt   positions 0 1 2 3 4 5 -> slots  0 1 2 3      holds positions 4 5 2 3
    decode   position  6           -> slot   2            holds positions 4 5 6 3: exactly those that query 6 sees

One query reads the buffer as it lies, since attention does not depend on the order of keys. Several queries get the old
window and all new keys in chronological order, and the new keys are stored afterwards.
"""

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

MIN_SLOTS = 64  # the first allocation, in tokens
MAX_SLACK = 1024  # tokens beyond the window that can be restored while the past is recorded


class RingLayer(CacheLayerMixin):
    """Keys and values for readers, in chronological order, over buffers in slot order.

    Attributes:
        key_buffer, value_buffer: ``[B, K, slots, D]``, or None before the first tokens. A slot without a token may hold
            anything.
    """

    key_buffer: Any = None
    value_buffer: Any = None

    @property
    def keys(self) -> Tensor | None:
        """Keys ``[B, K, tokens, D]`` of the stored tokens that the next query could see, oldest first.

        Assigning as many tokens replaces them, as code does that moves, casts or selects rows.
        """
        return None if self.key_buffer is None else self._read(self.key_buffer)

    @keys.setter
    def keys(self, states: Tensor | None) -> None:
        self.key_buffer = None if states is None else self._replaced(self.key_buffer, states)

    @property
    def values(self) -> Tensor | None:
        """Values of the same tokens as `keys`."""
        return None if self.value_buffer is None else self._read(self.value_buffer)

    @values.setter
    def values(self, states: Tensor | None) -> None:
        self.value_buffer = None if states is None else self._replaced(self.value_buffer, states)

    @property
    def slots(self) -> int:
        """Number of tokens that the buffer can hold now."""
        return 0 if self.key_buffer is None else int(self.key_buffer.shape[2])

    @property
    def nbytes(self) -> int:
        """Memory of both buffers, in bytes."""
        return 0 if self.key_buffer is None else int(self.key_buffer.nbytes + self.value_buffer.nbytes)

    def offload(self) -> None:
        """Move the buffers to CPU memory."""
        self._move("cpu")

    def prefetch(self) -> None:
        """Move the buffers back to the device of the model."""
        if self.is_initialized:
            self._move(self.device)

    def _move(self, device: torch.device | str) -> None:
        if self.is_initialized:
            self.key_buffer = self.key_buffer.to(device, non_blocking=True)
            self.value_buffer = self.value_buffer.to(device, non_blocking=True)

    @abstractmethod
    def stored(self) -> tuple[Tensor, Tensor]:
        """Keys and values of every token that the buffer holds, oldest first; some may have left the window."""

    @abstractmethod
    def restore(self, keys: Tensor, values: Tensor, length: int) -> None:
        """Fill an empty layer with what `stored` returned after `length` tokens."""

    @abstractmethod
    def _read(self, buffer: Tensor) -> Tensor:
        """The tokens of a buffer in chronological order."""

    @abstractmethod
    def _replaced(self, buffer: Tensor | None, states: Tensor) -> Tensor:
        """A buffer of the same slots with these tokens in chronological order."""

    def __repr__(self) -> str:
        window = "full attention" if self.sliding_window is None else f"window {self.sliding_window}"
        return f"{type(self).__name__}({window}, {int(self.get_seq_length())} tokens, {self.nbytes:,} bytes)"


class RollingLayer(RingLayer):
    """One layer's keys and values, at most W tokens of them, or all with ``sliding_window=None``.

    The buffer starts small and doubles until it has W slots; then its size never changes.

    Args:
        sliding_window: W, in tokens, or None for full attention.
    """

    is_compileable = False
    is_croppable = True

    def __init__(self, sliding_window: int | None = None) -> None:
        super().__init__()
        self.sliding_window = sliding_window
        self.is_sliding = sliding_window is not None
        self.cumulative_length = 0
        self.oldest = 0  # the first position whose slot has not been overwritten
        self.record_past = False
        self.unconfirmed = 0  # tokens stored since the last crop, while the past is recorded

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take dtype, device, batch and heads from the first ``[B, K, N, D]`` states."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.key_buffer = key_states.new_empty((*key_states.shape[:2], 0, key_states.shape[3]))
        self.value_buffer = value_states.new_empty((*value_states.shape[:2], 0, value_states.shape[3]))
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store ``[B, K, N, D]`` new keys and values, and return those that the new queries attend to.

        Returns:
            Keys and values ``[B, K, T, D]``, with T as returned by `get_mask_sizes`: for one query the buffer itself,
            in slot order once it has wrapped; for several, the old window and the new tokens in chronological order.

        Raises:
            ValueError: The batch size differs from that of the stored tokens.
        """
        self._check_batch(key_states)
        if not self.is_initialized or (self.cumulative_length == 0 and self.key_buffer.shape[0] != key_states.shape[0]):
            self.lazy_initialization(key_states, value_states)
        count, start = key_states.shape[2], self.cumulative_length
        first_visible = self._first_visible(start)
        self._reserve(count)
        # The new tokens see nothing older: they are returned as they came.
        if first_visible == start:
            self._store(key_states, value_states)
            return key_states, value_states
        # One token: the buffer itself, in slot order.
        if count == 1:
            self._store(key_states, value_states)
            filled = min(start + 1, self.slots)
            return self.key_buffer.narrow(2, 0, filled), self.value_buffer.narrow(2, 0, filled)
        # Old and new tokens fit into the buffer together: store first, then read them in order.
        if start + count - first_visible <= self.slots:
            self._store(key_states, value_states)
            end = start + count
            return self._span(self.key_buffer, first_visible, end), self._span(self.value_buffer, first_visible, end)
        # They do not fit: read the old window before the new tokens overwrite it.
        keys = torch.cat([self._span(self.key_buffer, first_visible, start), key_states], dim=2)
        values = torch.cat([self._span(self.value_buffer, first_visible, start), value_states], dim=2)
        self._store(key_states, value_states)
        return keys, values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Number of keys that `update` will return for that many queries, and the position of the first of them.

        Where `ring_slots` is not zero, the keys come in slot order and the position is that of the oldest.
        """
        start = self.cumulative_length
        end, first_visible = start + query_length, self._first_visible(start)
        if query_length > 1 or first_visible == start:
            return end - first_visible, first_visible
        length = min(end, self._slots_for(1))
        return length, end - length

    def ring_slots(self, query_length: int) -> int:
        """Number of leading keys that `update` will return in slot order; 0 if all are chronological."""
        start = self.cumulative_length
        if query_length > 1 or self._first_visible(start) == start:
            return 0
        slots = self._slots_for(1)
        return slots if start + 1 > slots else 0

    def get_seq_length(self) -> int:
        """Number of tokens so far, including those that have left the window."""
        return self.cumulative_length

    def get_max_length(self) -> int:
        """W, or -1 for a layer that keeps all tokens."""
        return -1 if self.sliding_window is None else self.sliding_window

    def activate_past_recording(self) -> None:
        """Keep up to `MAX_SLACK` tokens beyond the window, so that `crop` can undo rejected candidates."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` tokens (the argument is zero or negative).

        Raises:
            ValueError: The argument is positive, exceeds what is stored, or needs tokens that are overwritten.
        """
        count = -int(tokens_to_remove)  # assisted decoding counts in tensors in some releases
        length = self.cumulative_length - count
        if count < 0 or length < 0:
            raise ValueError(
                f"crop({tokens_to_remove}) is not possible with {self.cumulative_length} tokens stored: pass zero, or"
                " the number of tokens to remove as a negative number, at most as many as are stored."
            )
        if self.oldest > self._first_visible(length):
            raise ValueError(
                f"crop({tokens_to_remove}) is not possible: position {self._first_visible(length)} is needed again,"
                f" but the buffer of {self.slots} slots no longer holds positions before {self.oldest}. Call"
                " activate_past_recording() before the tokens that may be removed are processed, and remove at most"
                f" {MAX_SLACK} of them at a time."
            )
        self.cumulative_length = length
        self.unconfirmed = 0

    def reset(self) -> None:
        """Forget all tokens; the buffer stays allocated."""
        self.cumulative_length = self.oldest = self.unconfirmed = 0

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row of the batch `repeats` times."""
        if self.get_seq_length() > 0:
            self.key_buffer = self.key_buffer.repeat_interleave(repeats, dim=0)
            self.value_buffer = self.value_buffer.repeat_interleave(repeats, dim=0)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices` of the batch."""
        if self.get_seq_length() > 0:
            self.key_buffer, self.value_buffer = self.key_buffer[indices], self.value_buffer[indices]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Put the rows of the batch in the order `beam_idx`."""
        if self.get_seq_length() > 0:
            rows = beam_idx.to(self.key_buffer.device)
            self.key_buffer = self.key_buffer.index_select(0, rows)
            self.value_buffer = self.value_buffer.index_select(0, rows)

    def stored(self) -> tuple[Tensor, Tensor]:
        """Keys and values of every token that the buffer holds, oldest first; some may have left the window."""
        start, end = self.oldest, self.cumulative_length
        return self._span(self.key_buffer, start, end), self._span(self.value_buffer, start, end)

    def restore(self, keys: Tensor, values: Tensor, length: int) -> None:
        """Fill an empty layer with what `stored` returned after `length` tokens."""
        self.lazy_initialization(keys, values)
        self.cumulative_length = self.oldest = length - keys.shape[2]
        self._reserve(keys.shape[2])
        self._store(keys, values)

    def _read(self, buffer: Tensor) -> Tensor:
        return self._span(buffer, self._first_visible(self.cumulative_length), self.cumulative_length)

    def _replaced(self, buffer: Tensor | None, states: Tensor) -> Tensor:
        start = self._first_visible(self.cumulative_length)
        count = self.cumulative_length - start
        if buffer is None or states.shape[2] != count:
            raise ValueError(
                f"The layer holds {count} tokens and cannot be assigned {states.shape[2]}: use crop() to remove tokens,"
                " and update() to add them."
            )
        replaced = states.new_empty((*states.shape[:2], buffer.shape[2], states.shape[3]))
        self._write(replaced, states, start)
        self.oldest = start
        return replaced

    def _first_visible(self, position: int) -> int:
        """The first position that a query at `position` attends to."""
        return 0 if self.sliding_window is None else max(0, position - self.sliding_window + 1)

    def _slots_for(self, count: int) -> int:
        """Slots that the buffer will have once `count` more tokens are stored."""
        needed = end = self.cumulative_length + count
        limit = None
        if self.sliding_window is not None:
            slack = min(self.unconfirmed + count, MAX_SLACK) if self.record_past else 1
            limit = self.sliding_window - 1 + power_of_two(slack)
            needed = min(end, limit)
        if needed > self.slots:
            grown = max(MIN_SLOTS, power_of_two(needed))
            return grown if limit is None else min(grown, limit)
        if self.sliding_window is not None and not self.record_past:
            return min(self.slots, self.sliding_window)
        return self.slots

    def _reserve(self, count: int) -> None:
        slots = self._slots_for(count)
        if slots != self.slots:
            self._resize(slots)
            return
        made_in_inference = self.key_buffer.is_inference() and not torch.is_inference_mode_enabled()
        if self.key_buffer.requires_grad or made_in_inference:
            # Autograd needs the old values, or the buffer was created in inference mode and cannot be written here.
            self.key_buffer, self.value_buffer = self.key_buffer.clone(), self.value_buffer.clone()

    def _resize(self, slots: int) -> None:
        end = self.cumulative_length
        start = max(self.oldest, end - min(slots, self.slots))
        old_keys, old_values = self._span(self.key_buffer, start, end), self._span(self.value_buffer, start, end)
        self.key_buffer = old_keys.new_empty((*old_keys.shape[:2], slots, old_keys.shape[3]))
        self.value_buffer = old_values.new_empty((*old_values.shape[:2], slots, old_values.shape[3]))
        self._write(self.key_buffer, old_keys, start)
        self._write(self.value_buffer, old_values, start)
        self.oldest = start

    def _store(self, key_states: Tensor, value_states: Tensor) -> None:
        count, start = key_states.shape[2], self.cumulative_length
        kept = min(count, self.slots)
        if kept < count:
            key_states, value_states = key_states[:, :, count - kept :], value_states[:, :, count - kept :]
        self._write(self.key_buffer, key_states, start + count - kept)
        self._write(self.value_buffer, value_states, start + count - kept)
        self.cumulative_length = start + count
        self.oldest = max(self.oldest, self.cumulative_length - self.slots)
        if self.record_past:
            self.unconfirmed += count

    @staticmethod
    def _write(buffer: Tensor, states: Tensor, position: int) -> None:
        """Copy at most ``slots`` states, the first of them at `position`, into their slots."""
        count = states.shape[2]
        slot = position % buffer.shape[2] if count else 0
        head = min(count, buffer.shape[2] - slot)
        if head == count:
            buffer.narrow(2, slot, count).copy_(states)
        else:
            buffer[:, :, slot:].copy_(states[:, :, :head])
            buffer[:, :, : count - head].copy_(states[:, :, head:])

    @staticmethod
    def _span(buffer: Tensor, start: int, end: int) -> Tensor:
        """States of the positions from `start` to `end` in order: a view, or a copy where the span wraps around."""
        if start == end:
            return buffer[:, :, :0]
        slot, count = start % buffer.shape[2], end - start
        if slot + count <= buffer.shape[2]:
            return buffer[:, :, slot : slot + count]
        return torch.cat([buffer[:, :, slot:], buffer[:, :, : slot + count - buffer.shape[2]]], dim=2)

    def _check_batch(self, key_states: Tensor) -> None:
        if self.cumulative_length and self.key_buffer.shape[0] != key_states.shape[0]:
            raise ValueError(
                f"The cache holds {self.key_buffer.shape[0]} sequences, but the input has {key_states.shape[0]}. Pass"
                " the batch that filled the cache, use batch_select_indices or batch_repeat_interleave, or a new cache."
            )


def power_of_two(count: int) -> int:
    """The least power of two that is at least `count`."""
    return 1 << (count - 1).bit_length()
