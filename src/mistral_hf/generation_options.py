"""Options and prompts of `generate`, checked, for the JAX and TensorFlow ports.

Legend: B batch, S tokens of a prompt.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from transformers import GenerationConfig

Array = npt.NDArray[Any]

_MIN_BUCKET = 16


@dataclass(frozen=True)
class GenerationOptions:
    """The options of `generate` that a compiled loop depends on; hashable, to serve as a static argument.

    Fields have the names and the meaning of the library's `GenerationConfig`.

    Raises:
        ValueError: A field has an impossible value.
    """

    max_new_tokens: int
    pad_token_id: int
    eos_token_ids: tuple[int, ...] = ()
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool = False
    num_return_sequences: int = 1
    prefill_chunk_size: int | None = None
    prompt_lookup_num_tokens: int | None = None
    max_matching_ngram_size: int = 2

    def __post_init__(self) -> None:
        self._check("max_new_tokens", self.max_new_tokens >= 1, "must be at least 1")
        self._check("temperature", self.temperature > 0, "must be positive; do_sample=False is greedy")
        self._check("top_k", self.top_k >= 0, "must not be negative; 0 keeps all tokens")
        self._check("top_p", 0 < self.top_p <= 1, "must lie in (0, 1]")
        self._check("min_p", 0 <= self.min_p <= 1, "must lie in [0, 1]")
        self._check("repetition_penalty", self.repetition_penalty > 0, "must be positive; 1 changes nothing")
        self._check("num_beams", self.num_beams >= 1, "must be at least 1")
        self._check("num_beams", not (self.do_sample and self.num_beams > 1), "cannot be sampled: set do_sample=False")
        self._check("early_stopping", isinstance(self.early_stopping, bool), "must be True or False")
        self._check_number_of_sequences()
        for name in ("prefill_chunk_size", "prompt_lookup_num_tokens"):
            value = getattr(self, name)
            self._check(name, value is None or value >= 1, "must be at least 1, or None")
        self._check("max_matching_ngram_size", self.max_matching_ngram_size >= 1, "must be at least 1")
        alone = self.prompt_lookup_num_tokens is None or (self.num_beams == 1 and self.num_return_sequences == 1)
        self._check("prompt_lookup_num_tokens", alone, "needs num_beams=1 and num_return_sequences=1")

    def _check_number_of_sequences(self) -> None:
        self._check("num_return_sequences", self.num_return_sequences >= 1, "must be at least 1")
        possible = self.do_sample or self.num_return_sequences <= self.num_beams
        rule = f"needs as many beams (num_beams={self.num_beams}), or do_sample=True: greedy search finds one sequence"
        self._check("num_return_sequences", possible, rule)

    def _check(self, name: str, holds: bool, rule: str) -> None:
        if not holds:
            raise ValueError(f"{name}={getattr(self, name)!r} {rule}.")


_OPTIONS = (
    *("max_new_tokens", "max_length", "pad_token_id", "eos_token_id", "do_sample", "temperature", "top_k", "top_p"),
    *("min_p", "repetition_penalty", "num_beams", "length_penalty", "early_stopping", "num_return_sequences"),
    *("prefill_chunk_size", "prompt_lookup_num_tokens", "max_matching_ngram_size"),
)

_WITHOUT_EFFECT = (
    *("bos_token_id", "transformers_version", "_from_model_config", "use_cache", "return_dict_in_generate"),
    *("output_attentions", "output_hidden_states"),
)


def generation_options(
    defaults: GenerationConfig | None,
    prompt_length: int,
    generation_config: GenerationConfig | None,
    lacks: Collection[str] = (),
    **options: Any,
) -> GenerationOptions:
    """Combine the options of one call of `generate`.

    Args:
        defaults: The checkpoint's generation config.
        prompt_length: Number of tokens of the prompt, which ``max_length`` includes.
        generation_config: The caller's, which replaces the defaults.
        lacks: Options that the port does not have.
        **options: The caller's, which override both; None leaves an option unchanged.

    Returns:
        The options, with 20 new tokens if nothing limits their number.

    Raises:
        ValueError: An option is unknown, is not supported by the ports, or has an impossible value.
    """
    known = [name for name in _OPTIONS if name not in lacks]
    given = {name: value for name, value in options.items() if value is not None}
    if unknown := sorted(given.keys() - set(known)):
        raise ValueError(f"generate has no option {unknown[0]!r}; it takes {', '.join(known)}.")
    base = generation_config if generation_config is not None else defaults or GenerationConfig()
    stored = {name: value for name, value in base.to_diff_dict().items() if value is not None}
    if foreign := sorted(stored.keys() - set(known) - set(_WITHOUT_EFFECT)):
        raise ValueError(
            f"The generation config sets {foreign[0]}={stored[foreign[0]]!r}, which this port does not have: remove it,"
            f" or use the PyTorch model. The port takes {', '.join(known)}."
        )
    fields = {**stored, **given}
    new_tokens = fields.get("max_new_tokens")
    if new_tokens is None:
        new_tokens = fields["max_length"] - prompt_length if "max_length" in fields else 20
        if new_tokens < 1:
            raise ValueError(
                f"max_length={fields['max_length']} leaves no token after a prompt of {prompt_length}: raise it, or"
                " set max_new_tokens."
            )
    eos = fields.get("eos_token_id")
    eos_ids = () if eos is None else tuple(int(token) for token in np.atleast_1d(eos))
    pad = fields.get("pad_token_id")
    chosen = {name: _plain(fields[name]) for name in _OPTIONS[4:] if name in fields}
    return GenerationOptions(
        max_new_tokens=int(new_tokens),
        pad_token_id=int(pad) if pad is not None else eos_ids[0] if eos_ids else 0,
        eos_token_ids=eos_ids,
        **chosen,
    )


def _plain(value: Any) -> Any:
    """A Python number in place of a scalar of NumPy or of a tensor framework."""
    return value.item() if hasattr(value, "item") else value


def check_prompt(input_ids: Any, attention_mask: Any, vocab_size: int) -> tuple[Array, Array]:
    """Check a prompt.

    Args:
        input_ids: ``[B, S]`` integers.
        attention_mask: ``[B, S]``, nonzero for real tokens; None if all are.
        vocab_size: Number of tokens in the vocabulary.

    Returns:
        ``[B, S]`` int32 ids and a ``[B, S]`` boolean mask of the real tokens, as NumPy arrays.

    Raises:
        ValueError: Shapes do not fit, an id lies outside the vocabulary, a row has no token, or padding is not all on
            the left.
    """
    ids = np.asarray(input_ids)
    if ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(
            f"input_ids is {ids.dtype} {ids.shape}, but must be integers [batch, tokens]: pass a single one as [ids]."
        )
    real = np.ones(ids.shape, bool) if attention_mask is None else np.asarray(attention_mask).astype(bool)
    if real.shape != ids.shape:
        raise ValueError(
            f"attention_mask has shape {real.shape}, but input_ids {ids.shape}: it must have a column for each token."
        )
    if not real[:, -1:].all() or (np.diff(real.astype(np.int8), axis=1) < 0).any():
        raise ValueError(
            "generate needs padding on the left: every row of attention_mask must be zeros, then ones. Set"
            " tokenizer.padding_side = 'left' and encode the batch again."
        )
    if ids.size == 0:
        raise ValueError(f"input_ids has shape {ids.shape}, but every prompt needs at least one token: begin with bos.")
    if ids.min() < 0 or ids.max() >= vocab_size:
        raise ValueError(
            f"input_ids span [{ids.min()}, {ids.max()}], but must lie in [0, {vocab_size}): use the model's tokenizer."
        )
    return ids.astype(np.int32), real


def round_up_to_bucket(length: int) -> int:
    """The next power of two, at least 16: prompts padded to such lengths share compiled programs."""
    return max(_MIN_BUCKET, 1 << (length - 1).bit_length())
