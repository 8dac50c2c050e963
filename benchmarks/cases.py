"""The named cases: everyday work, work past the window, prompts by length, and a long prompt in chunks."""

from dataclasses import replace

from .harness import Case
from .models import Shape
from .workloads import Decoding, Generation, Importing, Loading, Prefill, Training

SHORT = Generation(
    name="decode_short",
    title="generate 32 tokens after a prompt of 64",
    group="everyday",
    length=64,
    tokens=32,
    repeats=9,
)
EVERYDAY = (
    SHORT,
    replace(SHORT, name="decode_short_compiled", title="the same, our step compiled", compiled=True),
    Prefill(name="prefill_short", title="prompt of 512 tokens", group="everyday", length=512, repeats=9),
    Prefill(
        name="prefill_long",
        title="prompt of 8192 tokens, W=1024",
        group="everyday",
        length=8192,
        window=1024,
        repeats=2,
        peak_memory=True,
    ),
    Loading(
        name="load", title="from_pretrained, page cache warm", group="everyday", length=1, repeats=7, peak_memory=True
    ),
    Importing(name="import", title="python -c 'import ...', with and without mistral_hf", group="everyday", repeats=3),
)

LONG_CACHE = Decoding(
    name="decode_past_window_b1",
    title="decode, batch 1, past W=4096",
    group="window",
    length=4160,
    window=4096,
    tokens=16,
    repeats=9,
)
LARGE_BATCH = replace(
    LONG_CACHE,
    name="decode_past_window_b8",
    title="decode, batch 8, past W=4096",
    batch=8,
    tokens=6,
    repeats=7,
    peak_memory=True,
)
WINDOW = (
    LARGE_BATCH,
    replace(
        LARGE_BATCH,
        name="decode_past_window_b8_bf16",
        title="decode, batch 8, past W=4096, bfloat16",
        dtype="bfloat16",
        peak_memory=False,
    ),
    LONG_CACHE,
    replace(
        LARGE_BATCH,
        name="decode_past_window_b8_static",
        title="decode, batch 8, past W=4096, reference with its static cache",
        reference_cache="static",
        peak_memory=False,
    ),
    replace(
        LARGE_BATCH,
        name="decode_full_b8",
        title="decode, batch 8, full attention at 4096 tokens",
        length=4096,
        window=None,
    ),
    replace(
        LARGE_BATCH,
        name="generate_past_window_b8",
        title="generate, batch 8, past W=4096",
        through="generate",
        peak_memory=False,
    ),
    replace(LONG_CACHE, name="generate_past_window_b1", title="generate, batch 1, past W=4096", through="generate"),
    Training(
        name="train_8k",
        title="training step, 8192 tokens, W=1024",
        group="window",
        length=8192,
        window=1024,
        shape=Shape(layers=12),
        repeats=2,
    ),
)

LENGTHS = tuple(
    Prefill(
        name=f"prefill_{length // 1024}k",
        title=f"prompt of {length} tokens, W=1024",
        group="lengths",
        length=length,
        window=1024,
        shape=Shape(layers=4),
        repeats=repeats,
        peak_memory=True,
    )
    for length, repeats in ((1024, 5), (2048, 5), (4096, 3), (8192, 3), (16384, 2), (32768, 1))
)

CHUNKS = Generation(
    name="prompt_in_chunks_100k",
    title="prompt of 102400 tokens in chunks of 1024, W=1024",
    group="chunks",
    length=102400,
    window=1024,
    chunk=1024,
    tokens=2,
    shape=Shape(layers=4),
    repeats=1,
    peak_memory=True,
)

CASES: tuple[Case, ...] = (*EVERYDAY, *WINDOW, *LENGTHS, CHUNKS)
