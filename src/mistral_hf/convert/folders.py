"""Whole folders: raw Mistral checkpoints to Hugging Face format and back, as a stream and all or nothing."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..checkpoints.reader import Array, Checkpoint, TensorInfo, numpy_dtype, open_checkpoint, same_bits
from ..checkpoints.writer import LazyTensor, Progress, atomic_folder, write_checkpoint, write_manifest
from ..compatibility import CheckpointError
from .lora import lora_config_to_peft, peft_config_to_lora
from .params import Params, complete_params, config_to_params, normalize_params, params_to_config
from .tensors import (
    LORA_TO_PEFT,
    RAW_TO_HF,
    check_adapter,
    check_tensors,
    hf_shapes,
    hf_to_raw,
    is_rotary,
    raw_shapes,
    raw_to_hf,
)
from .tokenizer import convert_tokenizer, find_raw_tokenizer

DTYPES = ("float32", "bfloat16", "float16")
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_SPARE_BYTES = 100_000_000


class Conversion(NamedTuple):
    """What a conversion did."""

    output: Path
    tensors: int
    nbytes: int
    notes: list[str]
    """A line for each thing that the input did not say, or that the output cannot hold."""

    def summary(self) -> str:
        """What a command prints at the end."""
        size = f"{self.tensors} tensors, {self.nbytes / 1e9:.3g} GB"
        return "\n".join(
            [*(f"note: {note}" for note in self.notes), f"{self.output}: {size}, every file in manifest.json"]
        )


def is_adapter(folder: str | Path) -> bool:
    """Whether a folder holds a LoRA adapter (raw or PEFT) and not a model."""
    return any((Path(folder) / name).exists() for name in ("lora.safetensors", "adapter_config.json"))


def convert_raw_to_hf(
    input_dir: str | Path,
    output_dir: str | Path,
    *,
    dtype: str | None = None,
    max_shard_size: int | str | None = "5GB",
    max_position_embeddings: int | None = None,
    rope_theta: float | None = None,
    tokenizer_version: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Conversion:
    """Convert a raw model folder, or a raw LoRA folder, to Hugging Face (or PEFT) format.

    Args:
        input_dir: Holds `params.json` and `consolidated.safetensors`, `consolidated.NN.pth` or `lora.safetensors`.
        output_dir: Appears only when complete.
        dtype: One of `DTYPES`; None keeps every bit.
        max_shard_size: In bytes or such as `"5GB"`; None for one file.
        max_position_embeddings: For a `params.json` that does not say it, or to override it.
        rope_theta: For a `params.json` that does not say it.
        tokenizer_version: Such as `"v3"`, for a `tokenizer.model` whose name does not say it.
        overwrite: Replace an existing output.
        progress: Called with (bytes done, bytes in all).

    Raises:
        ValueError: If the input is no dense Mistral text model, is damaged, or leaves out what is not known.
        FileExistsError: If the output exists.
    """
    source = _input(input_dir, output_dir)
    if is_adapter(source):
        return _raw_adapter_to_peft(source, output_dir, overwrite, progress)
    params = normalize_params(_read_json(source / "params.json"))
    params, notes = complete_params(params, max_position_embeddings, rope_theta)
    shapes = raw_shapes(params)
    with open_checkpoint(source, "consolidated", shapes) as checkpoint:
        _check_model(checkpoint, shapes, params, "output.weight", notes)
        tensors = [_translated(checkpoint, raw, RAW_TO_HF.to_target(raw), raw_to_hf, params, dtype) for raw in shapes]
        config = params_to_config(params, _main_dtype(tensors))
        tokenizer = find_raw_tokenizer(source)

        def write_rest(folder: Path) -> None:
            if tokenizer is None:
                notes.append(f"no tokenizer: {source} holds no tekken.json, tokenizer.model or *.model.v*")
            else:
                info = convert_tokenizer(tokenizer, folder, version=tokenizer_version, max_length=params["max_seq_len"])
                if info.vocab_size > params["vocab_size"]:
                    raise ValueError(f"{tokenizer} has {info.vocab_size} tokens, the model {params['vocab_size']}")
                config.update({name: getattr(info, name) for name in _TOKEN_IDS})
                (folder / "original").mkdir()
                shutil.copyfile(tokenizer, folder / "original" / tokenizer.name)
            _write_json(folder / "config.json", config)
            _write_json(folder / "generation_config.json", {name: config.get(name) for name in _TOKEN_IDS})

        return _write(output_dir, tensors, "model", max_shard_size, overwrite, progress, write_rest, notes)


def convert_hf_to_raw(
    input_dir: str | Path,
    output_dir: str | Path,
    *,
    dtype: str | None = None,
    max_shard_size: int | str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Conversion:
    """Convert a Hugging Face model folder, or a PEFT adapter, to the raw format.

    Args:
        input_dir: Holds `config.json` and safetensors weights, or `adapter_config.json`.
        output_dir: Appears only when complete; gets `params.json` and `consolidated.safetensors`.
        dtype: One of `DTYPES`; None keeps every bit.
        max_shard_size: None, as the raw format's readers expect, for one file.
        overwrite: Replace an existing output.
        progress: Called with (bytes done, bytes in all).

    Raises:
        ValueError: If the input is no dense Mistral model, is damaged, or has what the raw format cannot say.
        FileExistsError: If the output exists.
    """
    source = _input(input_dir, output_dir)
    if is_adapter(source):
        return _peft_adapter_to_raw(source, output_dir, overwrite, progress)
    params = config_to_params(_read_json(source / "config.json"))
    notes: list[str] = []
    shapes = hf_shapes(params)
    with open_checkpoint(source, "model") as checkpoint:
        _check_model(checkpoint, shapes, params, "lm_head.weight", notes)
        tensors = [_translated(checkpoint, hf, RAW_TO_HF.to_source(hf), hf_to_raw, params, dtype) for hf in shapes]
        tokenizer = find_raw_tokenizer(source)

        def write_rest(folder: Path) -> None:
            if tokenizer is None:
                notes.append("no tokenizer: the raw format needs the original tekken.json or tokenizer.model")
            else:
                shutil.copyfile(tokenizer, folder / tokenizer.name)
            _write_json(folder / "params.json", _without_nulls(params))

        return _write(output_dir, tensors, "consolidated", max_shard_size, overwrite, progress, write_rest, notes)


def _raw_adapter_to_peft(
    source: Path, output_dir: str | Path, overwrite: bool, progress: Progress | None
) -> Conversion:
    """Convert `lora.safetensors` and `params.json` to `adapter_model.safetensors` and `adapter_config.json`."""
    given = _read_json(source / "params.json")
    params = normalize_params(given)
    with open_checkpoint(source, "lora") as checkpoint:
        names = {raw: LORA_TO_PEFT.to_target(raw) for raw in checkpoint}
        rank = check_adapter(checkpoint.shapes, params, str(source))
        config = lora_config_to_peft(given, rank, names)
        tensors = [_translated(checkpoint, raw, peft, raw_to_hf, params, None) for raw, peft in names.items()]

        def write_rest(folder: Path) -> None:
            _write_json(folder / "adapter_config.json", config)

        return _write(output_dir, tensors, "adapter_model", None, overwrite, progress, write_rest, [])


def _peft_adapter_to_raw(
    source: Path, output_dir: str | Path, overwrite: bool, progress: Progress | None
) -> Conversion:
    """Convert `adapter_model.safetensors` and `adapter_config.json` to `lora.safetensors` and `params.json`."""
    config = _read_json(source / "adapter_config.json")
    params = _base_params(source, config)
    with open_checkpoint(source, "adapter_model") as checkpoint:
        names = {peft: LORA_TO_PEFT.to_source(peft) for peft in checkpoint}
        rank = check_adapter({raw: checkpoint[peft].shape for peft, raw in names.items()}, params, str(source))
        written = _without_nulls(params) | {"lora": peft_config_to_lora(config, rank)}
        tensors = [_translated(checkpoint, peft, raw, hf_to_raw, params, None) for peft, raw in names.items()]

        def write_rest(folder: Path) -> None:
            _write_json(folder / "params.json", written)

        return _write(output_dir, tensors, "lora", None, overwrite, progress, write_rest, [])


def _without_nulls(params: Params) -> Params:
    return {key: value for key, value in params.items() if value is not None}


def _base_params(source: Path, adapter: dict[str, Any]) -> Params:
    """The base model's params: a PEFT adapter names its base, whose head counts the way back needs."""
    base = adapter.get("base_model_name_or_path")
    for candidate in (source / "config.json", Path(str(base)) / "config.json"):
        if candidate.is_file():
            return config_to_params(_read_json(candidate))
    raise ValueError(f"{source}: the head counts are unknown: put the base model's config.json (of {base}) beside it")


def _input(input_dir: str | Path, output_dir: str | Path) -> Path:
    source, target = Path(input_dir).resolve(), Path(output_dir).resolve()
    if not source.is_dir():
        raise FileNotFoundError(f"{input_dir} is no folder")
    if target == source or target in source.parents:
        raise ValueError(f"the output {output_dir} is or contains the input {input_dir}: give another output")
    return source


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(f"{path.parent} lacks {path.name}")
    try:
        content = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is no JSON ({error}): copy it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is no JSON object")
    return content


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", "utf-8")


def _check_model(checkpoint: Checkpoint, expected: dict[str, Any], params: Params, head: str, notes: list[str]) -> None:
    """Check names and shapes; a head that repeats tied embeddings is let pass if it repeats them exactly."""
    found = checkpoint.shapes
    if params["tied_embeddings"] and head in found:
        if not same_bits(checkpoint.read(head), checkpoint.read(next(iter(expected)))):
            raise CheckpointError(
                f"the embeddings are tied, but {head} has other values: untie them in the configuration"
            )
        del found[head]
        notes.append(f"{head} left out: it repeats the tied embeddings")
    check_tensors(found, expected, "the checkpoint")


def _translated(
    checkpoint: Checkpoint,
    name: str,
    new_name: str,
    translate: Callable[[str, Array, Params], tuple[str, Array]],
    params: Params,
    dtype: str | None,
) -> LazyTensor:
    stored, shape = checkpoint[name]
    if dtype is not None and (dtype not in DTYPES or stored not in DTYPES):
        raise ValueError(f"cannot convert {name} from {stored} to {dtype}: the dtypes are {', '.join(DTYPES)}")
    target = dtype or stored
    read = partial(_read_translated, checkpoint, name, translate, params, target)
    unchanged = target == stored and not is_rotary(name) and not is_rotary(new_name)
    stream = partial(checkpoint.stream, name) if unchanged else None
    return LazyTensor(new_name, TensorInfo(target, shape), read, stream)


def _read_translated(
    checkpoint: Checkpoint, name: str, translate: Callable[..., tuple[str, Array]], params: Params, dtype: str
) -> Array:
    array = checkpoint.read(name)
    if array.dtype != numpy_dtype(dtype):
        cast = array.astype(numpy_dtype(dtype))
        if not np.isfinite(cast).all() and np.isfinite(array).all():
            raise ValueError(f"{name} has values too large for {dtype}: choose bfloat16 or float32")
        array = cast
    return translate(name, array, params)[1]


def _main_dtype(tensors: Sequence[LazyTensor]) -> str:
    sizes: Counter[str] = Counter()
    for tensor in tensors:
        sizes[tensor.info.dtype] += tensor.info.nbytes
    return sizes.most_common(1)[0][0]


def _write(
    output_dir: str | Path,
    tensors: Sequence[LazyTensor],
    stem: str,
    max_shard_size: int | str | None,
    overwrite: bool,
    progress: Progress | None,
    write_rest: Callable[[Path], None],
    notes: list[str],
) -> Conversion:
    nbytes = sum(tensor.info.nbytes for tensor in tensors)
    with atomic_folder(output_dir, overwrite=overwrite, needs_bytes=nbytes + _SPARE_BYTES) as folder:
        write_rest(folder)
        digests = write_checkpoint(folder, tensors, stem=stem, max_shard_size=max_shard_size, progress=progress)
        write_manifest(folder, digests)
    return Conversion(Path(output_dir), len(tensors), nbytes, notes)
