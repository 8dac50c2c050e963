"""The model card of the tiny checkpoint, written from measured figures."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import transformers
from corpus import HELD_OUT_ONE_IN, SourceText

if TYPE_CHECKING:
    from train import Settings


@dataclass(frozen=True)
class Run:
    """The size and cost of a training.

    Attributes:
        parameters: Parameters of the model.
        tokens: Tokens that the model was trained on, repetitions included.
        corpus_tokens: Tokens of the training text.
        wall: Seconds of wall-clock time.
        processor: Seconds of processor time.
        hardware: The device.
    """

    parameters: int
    tokens: int
    corpus_tokens: int
    wall: float
    processor: float
    hardware: str


@dataclass(frozen=True)
class Row:
    """Perplexity of a text that is cut into blocks.

    Attributes:
        text: Name of the text.
        length: Tokens of a block.
        tokens: Tokens of all blocks.
        windowed: Perplexity with the sliding window.
        full: Perplexity with full attention.
    """

    text: str
    length: int
    tokens: int
    windowed: float
    full: float


@dataclass(frozen=True)
class Evaluation:
    """Perplexities and samples of the finished model."""

    rows: list[Row]
    samples: list[str]


def render(corpus: list[SourceText], settings: Settings, run: Run, evaluation: Evaluation) -> str:
    """Write the card as Markdown with the hub's metadata block."""
    return CARD.format(
        window=settings.window,
        length=settings.length,
        parameters=f"{run.parameters / 1e6:.1f}",
        settings=settings,
        one_in=HELD_OUT_ONE_IN,
        sources=_table(
            ("text", "package", "version", "characters", "held out", "licence"),
            (
                (
                    text.source.title,
                    f"`{text.source.name}` ({text.source.client})",
                    text.version,
                    f"{text.characters:,}",
                    f"{sum(len(document.text) for document in text.documents if document.held_out):,}",
                    text.source.licence,
                )
                for text in corpus
            ),
        ),
        tokens=f"{run.tokens / 1e6:.1f}",
        epochs=f"{run.tokens / run.corpus_tokens:.1f}",
        corpus_tokens=f"{run.corpus_tokens / 1e6:.1f}",
        wall=f"{run.wall / 60:.0f}",
        processor=f"{run.processor / 60:.0f}",
        hardware=run.hardware,
        torch=torch.__version__,
        transformers=transformers.__version__,
        perplexities=_table(
            ("text", "tokens", "block", f"window {settings.window}", "no window"),
            (
                (row.text, f"{row.tokens:,}", str(row.length), f"{row.windowed:.2f}", f"{row.full:.2f}")
                for row in evaluation.rows
            ),
        ),
        samples="\n\n".join("> " + sample.strip().replace("\n", "\n> ") for sample in evaluation.samples),
    )


def _table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


CARD = """\
---
language: en
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
tags: [mistral, tiny]
---

# Tiny Mistral

A Mistral of {parameters} million parameters, trained from random weights on public-domain English. It is small enough
to ship with a package and real enough to test with:

- {settings.layers} layers of width {settings.hidden_size}, tied embeddings,
- grouped-query attention: {settings.heads} query heads, {settings.key_value_heads} key/value heads,
- a sliding window of {window} tokens, shorter than the {length} tokens that it was trained on,
- a byte-fallback BPE tokenizer of {settings.vocab_size:,} tokens, with a separate `<pad>` token.

**Intended use:** tests and demonstrations. It writes recognisable English sentences, but it is not fit to answer
questions or to inform anyone. It repeats the views of its sources, some of which are centuries old.

## Training data

{sources}

One document (chapter, address, profile) in {one_in}, chosen by a hash of its name, was held out: neither the model nor
the tokenizer was trained on it. `heldout.txt` is an excerpt of the held-out text; two blank lines separate its
documents.

## Training

`python examples/tiny_mistral/train.py` reproduces this folder, up to rounding on other machines.

- {settings.steps:,} steps of {settings.batch_size} blocks of {length} tokens: {tokens} million tokens, {epochs} times
  the {corpus_tokens} million of the training text
- Muon for the hidden matrices, AdamW for the rest, weight decay 0.1, gradient norm clipped at 1, seed {settings.seed}
- learning rate {settings.learning_rate:g} after {settings.warmup_steps} steps of linear warm-up; over the last
  {settings.decay_steps:,} steps it decays to zero as one minus a square root
- bfloat16 autocast, torch {torch}, transformers {transformers}
- {wall} minutes of wall-clock time, {processor} minutes of processor time, on {hardware}

## Evaluation

Held-out perplexity per token of the bfloat16 weights, computed in float32; every text begins with `<s>` and ends with
`</s>`, and the texts are cut into blocks end to end.

{perplexities}

## Samples

Temperature 0.7, top-p 0.9, the first words given:

{samples}
"""
