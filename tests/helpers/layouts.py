"""Layouts for masks, which do not depend on positions."""

import torch
from torch import Tensor

from mistral_hf.torch.sequence_layout import KeyLayout, Packing, SequenceLayout


def layout_of(keys: KeyLayout, padding: Tensor | None = None, segments: Tensor | None = None) -> SequenceLayout:
    """A `SequenceLayout` with empty positions."""
    return SequenceLayout(keys, torch.empty(0), padding, None if segments is None else Packing(segments))
