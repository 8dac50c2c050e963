"""Compare two checkpoint folders, each raw or in Hugging Face format: tensors, configuration, tokenizer, logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..checkpoints.json_file import read_json
from ..checkpoints.reader import Array, Checkpoint, open_checkpoint, same_bits
from ..checkpoints.writer import Progress
from ..compatibility import CheckpointError
from .config import config_to_params
from .folders import check_model, vision_tensors
from .params import Params, complete_params, normalize_params, params_difference
from .raw_forward import raw_logits
from .tensors import RAW_TO_HF, hf_shapes, hf_to_raw, raw_shapes
from .tokenizer import find_raw_tokenizer, raw_encoder

# Scripts, emoji, runs of spaces, code, and text that looks like control tokens.
SAMPLE_TEXT = (
    "The quick brown fox jumps over the lazy dog. Größe, naïve café — 東京は晴れ、안녕하세요! Привет, שלום, مرحبا"
    " 👩‍👩‍👧\n\n  def f(x):\n\treturn x ** 2  # 12345\r\n[INST] </s> <unk> [/INST]   trailing spaces   "
)

_OPTIONAL_FIELDS = ("rope_theta", "max_seq_len")  # that a raw ``params.json`` may leave out


class Check(NamedTuple):
    """One comparison and its outcome.

    Attributes:
        name: What was compared.
        ok: Whether it is the same; None if the comparison could not be made.
        detail: What was found, or why there was no comparison.
    """

    name: str
    ok: bool | None
    detail: str


class _Side(NamedTuple):
    folder: Path
    is_raw: bool
    params: Params
    checkpoint: Checkpoint
    left_out: int  # tensors of a vision tower

    def stored_name(self, raw_name: str) -> str:
        return raw_name if self.is_raw else RAW_TO_HF.to_target(raw_name)

    def read_raw(self, raw_name: str) -> Array:
        """A tensor in the row order of the raw format, whatever the folder's format."""
        name = self.stored_name(raw_name)
        array = self.checkpoint.read(name)
        return array if self.is_raw else hf_to_raw(name, array, self.params)[1]


def verify(
    a: str | Path,
    b: str | Path,
    *,
    text: str = SAMPLE_TEXT,
    logits: bool = True,
    tolerance: float = 1e-4,
    progress: Progress | None = None,
) -> Iterator[Check]:
    """Compare two folders.

    Args:
        a: A raw folder (with ``params.json``) or a Hugging Face one (with ``config.json``).
        b: The other folder.
        text: The text that both tokenizers encode and both models read.
        logits: Whether to run both models, in float32: a raw one with `raw_logits`, which holds one layer in memory at
            a time, a Hugging Face one with ``AutoModelForCausalLM``, which needs memory for the whole model.
        tolerance: The largest difference of logits that passes, relative to the largest logit.
        progress: Called with (bytes done, bytes in all) while the tensors are compared.

    Yields:
        A `Check` each for the configuration, the tensors, the tokenizer and the logits.

    Raises:
        ValueError: A folder holds no checkpoint of a dense Mistral text model, or a damaged one.
    """
    with _open_side(Path(a)) as first, _open_side(Path(b)) as second:
        left_out = [field for field in _OPTIONAL_FIELDS if None in (first.params[field], second.params[field])]
        first, second = _filled(first, second), _filled(second, first)
        yield _compare_config(first, second, left_out)
        yield _compare_tensors(first, second, progress)
        yield _compare_tokenizers(first, second, text)
        if logits:
            yield _compare_logits(first, second, text, tolerance)


def _filled(side: _Side, other: _Side) -> _Side:
    """Fill the optional fields that are left out, from the other side or from the table of published models."""
    params = side.params | {field: other.params[field] for field in _OPTIONAL_FIELDS if side.params[field] is None}
    with suppress(ValueError):  # `_compare_logits` says what is missing
        params, _ = complete_params(params)
    return side._replace(params=params)


@contextmanager
def _open_side(folder: Path) -> Iterator[_Side]:
    is_raw = (folder / "params.json").is_file() and not (folder / "config.json").is_file()
    path = folder / ("params.json" if is_raw else "config.json")
    if not path.is_file():
        raise ValueError(f"{folder} holds neither params.json nor config.json: give the folder of a checkpoint.")
    content = read_json(path)
    params = normalize_params(content) if is_raw else config_to_params(content)
    stem, head = ("consolidated", "output.weight") if is_raw else ("model", "lm_head.weight")
    shapes = raw_shapes(params) if is_raw else hf_shapes(params)
    with open_checkpoint(folder, stem, shapes) as checkpoint:
        vision = vision_tensors(checkpoint, content) if is_raw else []
        check_model(checkpoint, shapes, params, head, str(folder), vision)
        yield _Side(folder, is_raw, params, checkpoint, len(vision))


def _compare_config(a: _Side, b: _Side, left_out: Sequence[str]) -> Check:
    differing = params_difference(a.params, b.params)
    detail = "; ".join(f"{field}: {x!r} and {y!r}" for field, (x, y) in differing.items()) or "all fields agree"
    note = f" (not given by both: {', '.join(left_out)})" if left_out else ""
    return Check("configuration", not differing, detail + note)


def _compare_tensors(a: _Side, b: _Side, progress: Progress | None) -> Check:
    names, others = list(raw_shapes(a.params)), set(raw_shapes(b.params))
    if others != set(names):
        return Check("tensors", False, f"different sets: {sorted(others ^ set(names))[:4]}")
    sizes = [a.checkpoint[a.stored_name(name)].nbytes for name in names]
    done, total = 0, sum(sizes)
    for name, size in zip(names, sizes, strict=True):
        x, y = a.read_raw(name), b.read_raw(name)
        if not same_bits(x, y):
            what = f"{x.dtype} {x.shape} and {y.dtype} {y.shape}" if x.dtype != y.dtype else "different values"
            return Check("tensors", False, f"{name}: {what}")
        done += size
        if progress is not None:
            progress(done, total)
    vision = f" (not compared: {a.left_out + b.left_out} tensors of a vision tower)" if a.left_out or b.left_out else ""
    return Check("tensors", True, f"{len(names)} tensors are the same, bit for bit{vision}")


def _encoder(side: _Side) -> Callable[[str], list[int]] | None:
    """A function that encodes text with the folder's tokenizer, if it has one; control tokens stay text."""
    raw = find_raw_tokenizer(side.folder)
    if side.is_raw:
        return None if raw is None else raw_encoder(raw)
    if not (side.folder / "tokenizer.json").is_file():
        return None
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(side.folder)
    return lambda text: list(tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True))


def _compare_tokenizers(a: _Side, b: _Side, text: str) -> Check:
    encoders = _encoder(a), _encoder(b)
    missing = [str(side.folder) for side, encode in zip((a, b), encoders, strict=True) if encode is None]
    if missing:
        return Check("tokenizer", None, f"no tokenizer in {' and '.join(missing)}")
    first, second = (encode(text) for encode in encoders if encode is not None)
    if first == second:
        return Check("tokenizer", True, f"the same {len(first)} ids for the sample text")
    shorter = min(len(first), len(second))
    wrong = next((i for i, (x, y) in enumerate(zip(first, second, strict=False)) if x != y), shorter)
    return Check("tokenizer", False, f"the ids differ from token {wrong} on")


def _compare_logits(a: _Side, b: _Side, text: str, tolerance: float) -> Check:
    if None in (a.params["rope_theta"], b.params["rope_theta"]):
        why = "neither folder gives rope_theta: add it to params.json (the model card gives it)"
        return Check("logits", None, why)
    encode = _encoder(a) or _encoder(b)
    vocab = min(a.params["vocab_size"], b.params["vocab_size"])
    tokens = encode(text) if encode else np.random.default_rng(0).integers(0, vocab, 64).tolist()
    if max(tokens, default=0) >= vocab:
        return Check("logits", None, f"the tokenizer has ids beyond the vocabulary of {vocab} tokens")
    x, y = (_logits(side, [min(1, vocab - 1), *tokens]) for side in (a, b))
    error = float(np.abs(x - y).max() / np.abs(x).max())
    return Check(
        "logits", error <= tolerance, f"largest difference {error:.1e} of the largest logit, limit {tolerance:.0e}"
    )


def _logits(side: _Side, tokens: Sequence[int]) -> Any:
    """``[S, V]`` logits of S tokens in float32."""
    if side.is_raw:
        return raw_logits(side.checkpoint, side.params, tokens)
    import torch
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(side.folder, dtype=torch.float32).eval()
    except Exception as error:  # the library raises whatever it meets in a folder that it cannot load
        raise CheckpointError(f"{side.folder} cannot be loaded by transformers: {error}") from error
    with torch.no_grad():
        return model(torch.tensor([list(tokens)])).logits[0].numpy()
