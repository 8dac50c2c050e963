"""Sequences one by one, and packed into one row."""

from typing import Any

import torch
from torch import Tensor
from transformers import DataCollatorWithFlattening


def apart(sequences: list[dict[str, list[int]]]) -> list[dict[str, Tensor]]:
    """A batch of one row for every sequence."""
    return [{name: torch.tensor([values]) for name, values in row.items()} for row in sequences]


def flattened(sequences: list[dict[str, list[int]]]) -> dict[str, Any]:
    """One row of all sequences, whose positions restart."""
    return DataCollatorWithFlattening()(sequences)
