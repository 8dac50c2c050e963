"""What the JAX and the TensorFlow port share: checkpoint folders, and the options and rules of `generate`.

Framework-free: arrays are NumPy's, bfloat16 among them through `ml_dtypes`.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import GenerationConfig

from .checkpoints import Array, Checkpoint, CheckpointError, Shape, open_checkpoint
from .configuration_mistral import MistralConfig
from .output import LazyTensor, atomic_folder, write_checkpoint

logger = logging.getLogger(__name__)

HEADS = ("lm_head.", "score.", "qa_outputs.")  # what may differ between a checkpoint and the model that it loads into
BASE_PREFIX = "model."
_HUB_FILES = ("*.json", "*.safetensors")
_MIN_BUCKET = 16


def locate(name_or_path: str | Path, **hub_options: Any) -> Path:
    """The folder of a checkpoint; one on the hub is downloaded, or found in the hub's cache.

    Args:
        name_or_path: A folder, or an id on the hub.
        **hub_options: Of `huggingface_hub.snapshot_download`: `revision`, `token`, `cache_dir`, `local_files_only`, ...

    Raises:
        FileNotFoundError: There is neither such a folder nor such a model on the hub, or it cannot be reached.
    """
    folder = Path(name_or_path)
    if folder.is_dir():
        return folder
    try:
        return Path(snapshot_download(str(name_or_path), allow_patterns=list(_HUB_FILES), **hub_options))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, ConnectionError) as error:
        raise FileNotFoundError(
            f"{str(name_or_path)!r} is no folder here, and no model that the hub gives ({error}). Check the name;"
            " a gated model needs `hf auth login`."
        ) from error


@dataclass(frozen=True)
class Weights:
    """The tensors of a checkpoint by the names of the model that they load into.

    Attributes:
        missing: Head weights that the checkpoint lacks: to be initialised afresh.
        unexpected: Head weights that the model has no place for.
    """

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    _names: Mapping[str, str]
    _checkpoint: Checkpoint

    def stream(self) -> Iterator[tuple[str, Array]]:
        """Yield the model's names with their values, one tensor in memory at a time."""
        for name, stored in self._names.items():
            yield name, self._checkpoint.read(stored)


@contextmanager
def open_weights(folder: str | Path, wanted: Mapping[str, Shape]) -> Iterator[Weights]:
    """Match the safetensors files of a folder with a model, of any head or none.

    Args:
        folder: A checkpoint in the Hugging Face format.
        wanted: The model's tensors, by their Hugging Face names (with the prefix ``model.`` unless it is a bare
            `MistralModel`); a tied output layer is left out.

    Raises:
        CheckpointError: Weights of the decoder are missing, or unknown, or have another shape.
    """
    with open_checkpoint(folder) as checkpoint:
        names, unexpected = _match(checkpoint, wanted)
        missing = [name for name in wanted if name not in names]
        _require_heads(folder, "lacks", missing)
        _require_heads(folder, "has unknown", unexpected)
        for name, stored in names.items():
            if checkpoint[stored].shape != tuple(wanted[name]):
                raise CheckpointError(
                    f"{folder}: {stored} has shape {checkpoint[stored].shape}, but the configuration says"
                    f" {tuple(wanted[name])}: config.json and weights do not belong together."
                )
        if missing:
            logger.warning("%s lacks %s: newly initialised, to be trained.", folder, ", ".join(missing))
        if unexpected:
            logger.warning("%s has %s, which this model has no place for.", folder, ", ".join(unexpected))
        yield Weights(tuple(missing), tuple(unexpected), names, checkpoint)


def _match(found: Collection[str], wanted: Collection[str]) -> tuple[dict[str, str], list[str]]:
    """Wanted names with those they are stored under, and the stored names that are left over."""
    theirs, ours = (any(name.startswith(BASE_PREFIX) for name in names) for names in (found, wanted))

    def translate(name: str) -> str:
        if theirs and not ours:
            return name.removeprefix(BASE_PREFIX)
        return BASE_PREFIX + name if ours and not theirs and not name.startswith(HEADS) else name

    names = {translate(stored): stored for stored in found if "rotary_emb" not in stored}
    left = [stored for name, stored in names.items() if name not in wanted]
    return {name: names[name] for name in wanted if name in names}, left


def _require_heads(folder: str | Path, problem: str, names: Sequence[str]) -> None:
    if decoder := sorted(name for name in names if not name.startswith(HEADS)):
        raise CheckpointError(
            f"The checkpoint {str(folder)!r} {problem} {len(decoder)} weights of a Mistral decoder, the first of them"
            f" {', '.join(decoder[:3])}. Its config.json and its weights do not belong together: get both again from"
            " where they came from, or convert raw Mistral weights first."
        )


def save_folder(
    folder: str | Path,
    config: MistralConfig,
    generation_config: GenerationConfig | None,
    tensors: Sequence[LazyTensor],
    *,
    architecture: str,
    dtype: str,
    max_shard_size: int | str = "50GB",
) -> None:
    """Write a checkpoint that every framework loads; a folder that is there already is replaced, not mixed with it.

    Args:
        folder: The target, which appears only when it is complete.
        config: The model's configuration.
        generation_config: Defaults of `generate`, or None.
        tensors: The weights, by their Hugging Face names.
        architecture: The PyTorch class of this model, such as ``"MistralForCausalLM"``.
        dtype: Of the weights, such as ``"bfloat16"``.
        max_shard_size: As of `output.write_checkpoint`.
    """
    fields = {**config.to_dict(), "architectures": [architecture], "dtype": dtype}
    fields.pop("_name_or_path", None)
    target = Path(folder)
    kept = [path for path in target.iterdir() if path.is_file()] if target.is_dir() else []
    needs = sum(tensor.info.nbytes for tensor in tensors)
    with atomic_folder(folder, overwrite=any(target.glob("config.json")), needs_bytes=needs) as work:
        write_checkpoint(work, tensors, max_shard_size=max_shard_size)
        (work / "config.json").write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", "utf-8")
        if generation_config is not None:
            generation_config.save_pretrained(work)
        for path in kept:
            if not (path.name.startswith("model") and ".safetensors" in path.name) and not (work / path.name).exists():
                (work / path.name).write_bytes(path.read_bytes())


@dataclass(frozen=True)
class GenerationOptions:
    """What a compiled generation loop depends on; hashable, so that it can be a static argument.

    Fields have the names and the meaning of the library's `GenerationConfig`.
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

    def __post_init__(self) -> None:
        self._require("max_new_tokens", self.max_new_tokens >= 1, "must be at least 1")
        self._require("temperature", self.temperature > 0, "must be positive; do_sample=False is greedy")
        self._require("top_k", self.top_k >= 0, "must not be negative; 0 keeps all tokens")
        self._require("top_p", 0 < self.top_p <= 1, "must lie in (0, 1]")
        self._require("min_p", 0 <= self.min_p <= 1, "must lie in [0, 1]")
        self._require("repetition_penalty", self.repetition_penalty > 0, "must be positive; 1 changes nothing")
        self._require("num_beams", self.num_beams >= 1, "must be at least 1")
        self._require("num_beams", not (self.do_sample and self.num_beams > 1), "cannot be sampled: do_sample=False")
        self._require("early_stopping", isinstance(self.early_stopping, bool), "must be True or False")

    def _require(self, name: str, holds: bool, rule: str) -> None:
        if not holds:
            raise ValueError(f"{name}={getattr(self, name)!r} {rule}.")


_OPTIONS = (
    *("max_new_tokens", "max_length", "pad_token_id", "eos_token_id", "do_sample", "temperature", "top_k", "top_p"),
    *("min_p", "repetition_penalty", "num_beams", "length_penalty", "early_stopping"),
)
_HARMLESS = (
    *("bos_token_id", "transformers_version", "_from_model_config", "use_cache", "return_dict_in_generate"),
    *("output_attentions", "output_hidden_states"),
)


def generation_options(
    defaults: GenerationConfig | None, prompt_length: int, generation_config: GenerationConfig | None, **options: Any
) -> GenerationOptions:
    """Put together the options of one call of `generate`.

    Args:
        defaults: Those of the checkpoint.
        prompt_length: Tokens of the prompt, for ``max_length``.
        generation_config: Given by the caller, in place of the defaults.
        **options: Given by the caller, before both; None leaves an option as it is.

    Raises:
        ValueError: An option is unknown, is one that the ports do not have, or has an impossible value.
    """
    given = {name: value for name, value in options.items() if value is not None}
    if unknown := sorted(given.keys() - set(_OPTIONS)):
        raise ValueError(f"generate has no option {unknown[0]!r}; it takes {', '.join(_OPTIONS)}.")
    base = generation_config if generation_config is not None else defaults or GenerationConfig()
    stored = {name: value for name, value in base.to_diff_dict().items() if value is not None}
    if foreign := sorted(stored.keys() - set(_OPTIONS) - set(_HARMLESS)):
        raise ValueError(
            f"The generation config asks for {foreign[0]}={stored[foreign[0]]!r}, which this port does not have;"
            f" remove it, or use the PyTorch model. It takes {', '.join(_OPTIONS)}."
        )
    fields = {**stored, **given}
    new_tokens = fields.get("max_new_tokens")
    if new_tokens is None:
        new_tokens = fields["max_length"] - prompt_length if "max_length" in fields else 20
    if new_tokens < 1:
        raise ValueError(f"max_length={fields.get('max_length')} leaves no token after a prompt of {prompt_length}.")
    eos = fields.get("eos_token_id")
    eos_ids = () if eos is None else (int(eos),) if isinstance(eos, int) else tuple(int(token) for token in eos)
    pad = fields.get("pad_token_id")
    chosen = {name: fields[name] for name in _OPTIONS[4:] if name in fields}
    return GenerationOptions(
        max_new_tokens=int(new_tokens),
        pad_token_id=int(pad) if pad is not None else eos_ids[0] if eos_ids else 0,
        eos_token_ids=eos_ids,
        **chosen,
    )


def check_prompt(input_ids: Any, attention_mask: Any, vocab_size: int) -> tuple[Array, Array]:
    """A prompt as NumPy arrays, checked: ``[B, S]`` int32 ids and a ``[B, S]`` boolean mask of real tokens.

    Raises:
        ValueError: Shapes do not fit, an id lies outside the vocabulary, a row has no token, or padding is not all on
            the left.
    """
    ids = np.asarray(input_ids)
    if ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"input_ids must be integers [batch, tokens], not {ids.dtype} {ids.shape}.")
    real = np.ones(ids.shape, bool) if attention_mask is None else np.asarray(attention_mask).astype(bool)
    if real.shape != ids.shape:
        raise ValueError(f"attention_mask has shape {real.shape}, but input_ids {ids.shape}: they must be the same.")
    if not real[:, -1:].all() or (np.diff(real.astype(np.int8), axis=1) < 0).any():
        raise ValueError(
            "generate needs padding on the left: every row of attention_mask must be zeros, then ones. Set"
            " tokenizer.padding_side = 'left' and encode the batch again."
        )
    if ids.size == 0 or ids.min() < 0 or ids.max() >= vocab_size:
        span = f"[{ids.min()}, {ids.max()}]" if ids.size else "an empty prompt"
        raise ValueError(f"input_ids span {span}, but must lie in [0, {vocab_size}), with at least one token a row.")
    return ids.astype(np.int32), real


def prompt_bucket(length: int) -> int:
    """The length that a prompt is padded to on the left: prompts of similar lengths share a compiled program."""
    return max(_MIN_BUCKET, 1 << (length - 1).bit_length())


ROTARY_TYPES = ("default", "linear", "llama3", "yarn")


def rotary_frequencies(config: MistralConfig) -> tuple[Array, float]:
    """Angles that a rotary embedding turns by from one position to the next, and a factor of its cos and sin.

    Frequencies are ``theta ** (-2i / D)`` (Su et al., 2021), changed as ``config.rope_parameters`` says: all divided by
    one factor ("linear"), or only slow ones ("llama3"; "yarn": Peng et al., 2023).

    Returns:
        ``[D/2]`` in float32, and the factor.

    Raises:
        ValueError: The type is one that the ports do not have.
    """
    parameters: dict[str, Any] = dict(config.rope_parameters or {})
    kind, head_dim = parameters["rope_type"], int(config.head_dim or 0)
    if kind not in ROTARY_TYPES or parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(
            f"rope_parameters={parameters!r} is not among what the ports compute: {', '.join(ROTARY_TYPES)}, without a"
            " partial_rotary_factor. Use the PyTorch model for this checkpoint."
        )
    theta = float(parameters["rope_theta"])
    frequencies = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    scaling = 1.0
    if kind == "linear":
        frequencies = frequencies / parameters["factor"]
    elif kind == "llama3":
        frequencies = _llama3(frequencies, parameters)
    elif kind == "yarn":
        frequencies, scaling = _yarn(frequencies, theta, parameters, config.max_position_embeddings)
    return frequencies.astype(np.float32), scaling


def _llama3(frequencies: Array, parameters: Mapping[str, Any]) -> Array:
    """Slow frequencies divided by `factor`, fast ones as they are, those between in proportion."""
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    turns = parameters["original_max_position_embeddings"] * frequencies / (2 * math.pi)  # within the pretrained length
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return frequencies * (kept + (1 - kept) / parameters["factor"])


def _yarn(frequencies: Array, theta: float, parameters: Mapping[str, Any], length: int) -> tuple[Array, float]:
    """Slow frequencies divided by `factor`, with a ramp in the index of a frequency, and cos and sin scaled."""
    original = parameters["original_max_position_embeddings"]
    factor, count = parameters["factor"] or length / original, len(frequencies)

    def index(turns: float) -> float:
        return count * math.log(original / (turns * 2 * math.pi)) / math.log(theta)

    first, last = index(parameters.get("beta_fast") or 32), index(parameters.get("beta_slow") or 1)
    if parameters.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * count - 1)
    ramp = np.clip((np.arange(count) - first) / ((last - first) or 0.001), 0, 1)
    return frequencies * ((1 - ramp) + ramp / factor), _yarn_scaling(factor, parameters)


def _yarn_scaling(factor: float, parameters: Mapping[str, Any]) -> float:
    def scaling(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    given, weights = parameters.get("attention_factor"), (parameters.get("mscale"), parameters.get("mscale_all_dim"))
    if given is not None:
        return float(given)
    return scaling(weights[0]) / scaling(weights[1]) if weights[0] and weights[1] else scaling(1.0)
