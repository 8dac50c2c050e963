"""Measure how long banded attention takes with different blocks of queries: ``python -m benchmarks.attention_block``.

One layer's attention (9 query heads, 3 key/value heads, head_dim 64, float32, 8192 tokens), forward only and forward
with backward. Blocks alternate, and the medians are written to ``results/attention_block.json``.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mistral_hf.torch import attention

from .harness import TOLERANCES, environment, medians
from .report import finish, make_parser, output_path

BLOCKS = (128, 256, 512, 1024, 2048)
WINDOWS = (1024, 4096)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line `arguments`: measure every block for both windows."""
    options = make_parser("attention_block", __doc__, "--repeats", "--tiny", "--output").parse_args(arguments)
    length, repeats = 64 if options.tiny else 8192, options.repeats or 5
    record: dict[str, Any] = {"environment": environment(), "length": length, "repeats": repeats, "seconds": {}}
    for window in WINDOWS:
        for train in (False, True):
            name = f"window {window}, {'forward and backward' if train else 'forward'}"
            record["seconds"][name] = medians = measure(name, length, window, train, repeats)
            print(name, {block: round(value, 3) for block, value in medians.items()}, flush=True)
    finish(output_path(options, "attention_block"), record)


def measure(name: str, length: int, window: int, train: bool, repeats: int) -> dict[str, float]:
    """Median seconds of one layer's attention, by block."""
    query, key, value = (torch.randn(1, heads, length, 64, requires_grad=train) for heads in (9, 3, 3))
    mask = attention.BandMask(window, 0, None, None)

    def attend() -> Tensor:
        with torch.set_grad_enabled(train):
            output, _ = attention.sdpa_attention_forward(nn.Module(), query, key, value, mask, scaling=0.125)
        if train:
            torch.autograd.grad(output.sum(), (query, key, value))
        return output.detach()

    runs = {str(block): partial(with_block, block, attend) for block in BLOCKS}
    return medians(name, runs, repeats, TOLERANCES["float32"], reference=str(BLOCKS[0]))


def with_block(block: int, run: Callable[[], Tensor]) -> Tensor:
    """Call `run` while attention takes this many queries at a time."""
    before, attention.BLOCK = attention.BLOCK, block
    try:
        return run()
    finally:
        attention.BLOCK = before


if __name__ == "__main__":
    main()
