"""Which block of queries banded attention should take: ``python -m benchmarks.attention_block``.

One layer's attention (9 query heads, 3 key/value heads, head_dim 64, float32, 8192 tokens) for several blocks, forward
and backward too; the blocks are interleaved, and the medians are written to ``results/attention_block.json``.
"""

import statistics
from pathlib import Path
from time import perf_counter

import torch
from torch import nn

from mistral_hf.torch import attention

from .harness import environment, write_json

BLOCKS = (128, 256, 512, 1024, 2048)
LENGTH = 8192
RESULT = Path(__file__).parent / "results" / "attention_block.json"


def main(repeats: int = 5, length: int = LENGTH, output: Path = RESULT) -> None:
    """Measure every block for windows of 1024 and 4096, and write the seconds."""
    record = {"environment": environment(), "length": length, "repeats": repeats, "seconds": {}}
    for window in (1024, 4096):
        for train in (False, True):
            seconds: dict[int, list[float]] = {block: [] for block in BLOCKS}
            for _ in range(repeats + 1):
                for block in BLOCKS:
                    seconds[block].append(attend(block, length, window, train))
            medians = {block: statistics.median(samples[1:]) for block, samples in seconds.items()}
            name = f"window {window}, {'forward and backward' if train else 'forward'}"
            record["seconds"][name] = medians
            print(name, {block: round(value, 3) for block, value in medians.items()}, flush=True)
    write_json(output, record)


def attend(block: int, length: int, window: int, train: bool) -> float:
    """Seconds that one layer's attention takes with this block."""
    query, key, value = (torch.randn(1, heads, length, 64, requires_grad=train) for heads in (9, 3, 3))
    mask = attention.BandMask(window, 0, None, None)
    before, attention.BLOCK = attention.BLOCK, block
    start = perf_counter()
    with torch.set_grad_enabled(train):
        output, _ = attention.sdpa_attention_forward(nn.Module(), query, key, value, mask, scaling=0.125)
        if train:
            output.sum().backward()
    elapsed = perf_counter() - start
    attention.BLOCK = before
    return elapsed


if __name__ == "__main__":
    main()
