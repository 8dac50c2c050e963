"""Whole folders: raw Mistral checkpoints to Hugging Face format and back, as a stream and all or nothing."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..checkpoints.json_file import read_json
from ..checkpoints.reader import Array, Checkpoint, Shape, TensorInfo, numpy_dtype, open_checkpoint, same_bits
from ..checkpoints.writer import (
    CONVERSION,
    LazyTensor,
    Progress,
    atomic_folder,
    check_converted,
    check_new,
    write_checkpoint,
    write_manifest,
)
from ..compatibility import CheckpointError
from .config import config_to_params, params_to_config
from .lora import lora_config_to_peft, peft_config_to_lora
from .params import VISION, Params, complete_params, normalize_params, params_difference
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
    vision_part,
)
from .tokenizer import convert_tokenizer, find_raw_tokenizer

DTYPES = ("float32", "bfloat16", "float16")
SHARD_SIZE = "5GB"  # of a model in the Hugging Face format, unless another is given
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_SPARE_BYTES = 100_000_000
_ORIGINAL = "original"  # the subfolder with raw files, for the way back


class Conversion(NamedTuple):
    """What a conversion did.

    Attributes:
        output: The folder that was written.
        tensors: Number of tensors.
        nbytes: Size of the tensors in bytes.
        notes: A line for each thing that the input did not give, or that the output cannot hold.
        left_out: The tensors of the input that the output lacks: those of a vision tower.
    """

    output: Path
    tensors: int
    nbytes: int
    notes: list[str]
    left_out: tuple[str, ...] = ()

    def summary(self) -> str:
        """The lines that a command prints at the end."""
        size = f"{self.tensors} tensors, {self.nbytes / 1e9:.3g} GB"
        return "\n".join([*(f"note: {note}" for note in self.notes), f"{self.output}: {size}, listed in manifest.json"])


def is_adapter(folder: str | Path) -> bool:
    """Whether a folder holds a LoRA adapter (raw or PEFT) and not a model."""
    return any((Path(folder) / name).exists() for name in ("lora.safetensors", "adapter_config.json"))


def convert_raw_to_hf(
    input_dir: str | Path,
    output_dir: str | Path,
    *,
    dtype: str | None = None,
    max_shard_size: int | str | None = None,
    max_position_embeddings: int | None = None,
    rope_theta: float | None = None,
    tokenizer_version: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Conversion:
    """Convert a raw model folder, or a raw LoRA folder, to Hugging Face (or PEFT) format.

    Of a model with a vision tower, the text model is converted, and the tower is left out, as the result says.
    An adapter takes `dtype`, `overwrite` and `progress` only: the other options belong to its base model.

    Args:
        input_dir: Holds ``params.json`` and ``consolidated.safetensors``, ``consolidated.NN.pth`` or
            ``lora.safetensors``.
        output_dir: The folder to write, which appears only when it is complete.
        dtype: One of `DTYPES`; None keeps every bit.
        max_shard_size: In bytes or such as ``"5GB"``, which None stands for.
        max_position_embeddings: For a ``params.json`` that does not give it, or to override it.
        rope_theta: For a ``params.json`` that does not give it.
        tokenizer_version: Such as ``"v3"``, for a ``tokenizer.model`` whose name does not give it.
        overwrite: Replace a folder that a conversion wrote, if nothing else is in it.
        progress: Called with (bytes done, bytes in all).

    Raises:
        ValueError: The input is not a dense Mistral text model, is damaged, or leaves out a value that is not known; or
            an option does not apply to an adapter.
        FileExistsError: The output exists, and is not to be replaced or holds other files.
    """
    source = _check_folders(input_dir, output_dir)
    if is_adapter(source):
        _check_adapter_options(
            source,
            max_shard_size=max_shard_size,
            max_position_embeddings=max_position_embeddings,
            rope_theta=rope_theta,
            tokenizer_version=tokenizer_version,
        )
        return _raw_adapter_to_peft(source, _Output(output_dir, dtype, None, overwrite, progress))
    output = _Output(output_dir, dtype, SHARD_SIZE if max_shard_size is None else max_shard_size, overwrite, progress)
    given = read_json(source / "params.json")
    params, notes = complete_params(normalize_params(given), max_position_embeddings, rope_theta)
    shapes = raw_shapes(params)
    with open_checkpoint(source, "consolidated", shapes) as checkpoint:
        vision = vision_tensors(checkpoint, given)
        repeated = check_model(checkpoint, shapes, params, "output.weight", str(source), vision)
        tensors = [_translated(checkpoint, raw, RAW_TO_HF.to_target(raw), raw_to_hf, params, dtype) for raw in shapes]
        config = params_to_config(params, _main_dtype(tensors))
        tokenizer = find_raw_tokenizer(source)
        missing = [] if tokenizer else [f"no tokenizer: {source} holds no tekken.json, tokenizer.model or *.model.v*"]

        def write_rest(folder: Path) -> None:
            (folder / _ORIGINAL).mkdir()
            shutil.copyfile(source / "params.json", folder / _ORIGINAL / "params.json")
            ids = _convert_tokenizer(tokenizer, folder, tokenizer_version, params) if tokenizer else {}
            _write_json(folder / "config.json", config | ids)
            _write_json(folder / "generation_config.json", {name: (config | ids).get(name) for name in _TOKEN_IDS})

        written = output.write("model", tensors, write_rest, [*notes, *repeated, *_vision_notes(vision), *missing])
        return written._replace(left_out=tuple(vision))


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
        input_dir: Holds ``config.json`` and safetensors weights, or ``adapter_config.json``.
        output_dir: The folder to write, which appears only when it is complete; gets ``params.json`` and
            ``consolidated.safetensors`` (``lora.safetensors`` for an adapter).
        dtype: One of `DTYPES`; None keeps every bit.
        max_shard_size: None, as readers of the raw format expect, for one file; an adapter is always one file.
        overwrite: Replace a folder that a conversion wrote, if nothing else is in it.
        progress: Called with (bytes done, bytes in all).

    Raises:
        ValueError: The input is not a dense Mistral model, is damaged, or has something that the raw format cannot
            express; or an option does not apply to an adapter.
        FileExistsError: The output exists, and is not to be replaced or holds other files.
    """
    source = _check_folders(input_dir, output_dir)
    output = _Output(output_dir, dtype, max_shard_size, overwrite, progress)
    if is_adapter(source):
        _check_adapter_options(source, max_shard_size=max_shard_size)
        return _peft_adapter_to_raw(source, output)
    params = config_to_params(read_json(source / "config.json"))
    shapes = hf_shapes(params)
    with open_checkpoint(source, "model") as checkpoint:
        repeated = check_model(checkpoint, shapes, params, "lm_head.weight", str(source))
        tensors = [_translated(checkpoint, hf, RAW_TO_HF.to_source(hf), hf_to_raw, params, dtype) for hf in shapes]
        tokenizer = find_raw_tokenizer(source)
        missing = [] if tokenizer else ["no tokenizer: a raw folder needs the original tekken.json or tokenizer.model"]
        content, notes = _raw_params(source, params)

        def write_rest(folder: Path) -> None:
            if tokenizer is not None:
                shutil.copyfile(tokenizer, folder / tokenizer.name)
            (folder / "params.json").write_bytes(content)

        return output.write("consolidated", tensors, write_rest, [*notes, *repeated, *missing])


@dataclass(frozen=True)
class _Output:
    """Where and how a conversion writes; its fields are arguments of `convert_raw_to_hf`."""

    folder: str | Path
    dtype: str | None
    max_shard_size: int | str | None
    overwrite: bool
    progress: Progress | None

    def write(
        self,
        stem: str,
        tensors: Sequence[LazyTensor],
        write_rest: Callable[[Path], None],
        notes: Iterable[str] = (),
    ) -> Conversion:
        """Write the other files, the weights under the name `stem`, and the manifest."""
        nbytes = sum(tensor.info.nbytes for tensor in tensors)
        check = check_converted if self.overwrite else check_new
        with atomic_folder(self.folder, check_replaceable=check, needs_bytes=nbytes + _SPARE_BYTES) as folder:
            write_rest(folder)  # first, since it may find errors and weights take long
            digests = write_checkpoint(
                folder, tensors, stem=stem, max_shard_size=self.max_shard_size, progress=self.progress
            )
            write_manifest(folder, digests, CONVERSION)
        return Conversion(Path(self.folder), len(tensors), nbytes, list(notes))


def _raw_adapter_to_peft(source: Path, output: _Output) -> Conversion:
    """Convert ``lora.safetensors`` and ``params.json`` to ``adapter_model.safetensors`` and ``adapter_config.json``."""
    given = read_json(source / "params.json")
    params = normalize_params(given)
    with open_checkpoint(source, "lora") as checkpoint:
        names = {raw: LORA_TO_PEFT.to_target(raw) for raw in checkpoint}
        rank = check_adapter(checkpoint.shapes, params, str(source))
        config = lora_config_to_peft(given, rank, names)
        tensors = [_translated(checkpoint, raw, peft, raw_to_hf, params, output.dtype) for raw, peft in names.items()]
        return output.write(
            "adapter_model", tensors, lambda folder: _write_json(folder / "adapter_config.json", config)
        )


def _peft_adapter_to_raw(source: Path, output: _Output) -> Conversion:
    """Convert ``adapter_model.safetensors`` and ``adapter_config.json`` to ``lora.safetensors`` and ``params.json``."""
    config = read_json(source / "adapter_config.json")
    params = _base_params(source, config)
    with open_checkpoint(source, "adapter_model") as checkpoint:
        names = {peft: LORA_TO_PEFT.to_source(peft) for peft in checkpoint}
        rank = check_adapter({raw: checkpoint[peft].shape for peft, raw in names.items()}, params, str(source))
        written = _without_nulls(params) | {"lora": peft_config_to_lora(config, rank)}
        tensors = [_translated(checkpoint, peft, raw, hf_to_raw, params, output.dtype) for peft, raw in names.items()]
        return output.write("lora", tensors, lambda folder: _write_json(folder / "params.json", written))


def _convert_tokenizer(tokenizer: Path, folder: Path, version: str | None, params: Params) -> dict[str, int]:
    """Write a raw tokenizer in both formats, the original for the way back, and return its token ids."""
    info = convert_tokenizer(tokenizer, folder, version=version, max_length=params["max_seq_len"])
    if info.vocab_size > params["vocab_size"]:
        raise ValueError(
            f"{tokenizer} has {info.vocab_size} tokens, but the model has {params['vocab_size']}: they do not belong"
            " together."
        )
    shutil.copyfile(tokenizer, folder / _ORIGINAL / tokenizer.name)
    return {name: getattr(info, name) for name in _TOKEN_IDS}


def vision_tensors(checkpoint: Iterable[str], given: Params) -> list[str]:
    """The names of the tensors of the vision tower that a raw ``params.json`` describes, if it does."""
    return [name for name in checkpoint if vision_part(name)] if given.get(VISION) else []


def _vision_notes(names: Iterable[str]) -> list[str]:
    """A line for each part of a vision tower that is left out."""
    counts = Counter(str(vision_part(name)) for name in names)
    return [f"{part}.* left out: {count} tensors of the vision tower" for part, count in sorted(counts.items())]


def _raw_params(source: Path, params: Params) -> tuple[bytes, list[str]]:
    """The content of ``params.json``, that of the original file if it says the same as `params`, and notes."""
    content, notes = _json(_without_nulls(params)), list[str]()
    with suppress(ValueError):  # there is no original, or it needs values that were given as options
        path = source / _ORIGINAL / "params.json"
        given = read_json(path)
        original, _ = complete_params(normalize_params(given))
        if given.get(VISION):
            notes = [f"the text model only: {path} describes a vision tower too, whose tensors were left out"]
        elif not params_difference(original, params):
            content = path.read_bytes()
    return content, notes


def _without_nulls(params: Params) -> Params:
    return {key: value for key, value in params.items() if value is not None}


def _base_params(source: Path, adapter: dict[str, Any]) -> Params:
    """The params of the base model that a PEFT adapter names; the way back needs its head counts."""
    base = adapter.get("base_model_name_or_path")
    folders = (source, Path(base)) if isinstance(base, str) else (source,)
    for folder in folders:
        if (folder / "config.json").exists():
            return config_to_params(read_json(folder / "config.json"))
    raise ValueError(
        f"{source}: the head counts are unknown. Put the config.json of the base model ({base!r:.200}) into it."
    )


def _check_folders(input_dir: str | Path, output_dir: str | Path) -> Path:
    """Check that the input is a folder that the output would not replace, and return its path."""
    source, target = Path(os.path.realpath(input_dir)), Path(os.path.realpath(output_dir))
    if not source.is_dir():
        raise FileNotFoundError(f"{input_dir} is not a folder: give one that holds a checkpoint.")
    if target == source or target in source.parents:
        raise ValueError(f"The output {output_dir} is or contains the input {input_dir}: give another output.")
    return source


def _check_adapter_options(source: Path, **options: Any) -> None:
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise ValueError(f"{source} is an adapter: leave out {', '.join(given)}, which only whole models have.")


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_bytes(_json(content))


def _json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()


def check_model(
    checkpoint: Checkpoint,
    expected: Mapping[str, Shape],
    params: Params,
    head: str,
    where: str,
    left_out: Iterable[str] = (),
) -> list[str]:
    """Check that a checkpoint holds a whole model; a head beside tied embeddings passes if it repeats them exactly.

    Args:
        checkpoint: The open checkpoint.
        expected: The shape of every tensor, the input embeddings first.
        params: From `normalize_params`.
        head: The name of the head.
        where: Names the checkpoint in an error, as the first words of a sentence.
        left_out: Tensors that do not count.

    Returns:
        A note for each other tensor that is to be left out.

    Raises:
        ValueError: A tensor is unknown, missing, or of another shape.
    """
    found, notes = checkpoint.shapes, []
    for name in left_out:
        del found[name]
    if params["tied_embeddings"] and head in found:
        if not same_bits(checkpoint.read(head), checkpoint.read(next(iter(expected)))):
            raise CheckpointError(
                f"{where}: the embeddings are tied, but {head} has other values: untie them in the configuration."
            )
        del found[head]
        notes.append(f"{head} left out: it repeats the tied embeddings")
    check_tensors(found, expected, where)
    return notes


def _translated(
    checkpoint: Checkpoint,
    name: str,
    new_name: str,
    translate: Callable[[str, Array, Params], tuple[str, Array]],
    params: Params,
    dtype: str | None,
) -> LazyTensor:
    """One tensor of the output; its bytes are copied without decoding where neither dtype nor row order changes."""
    stored, shape = checkpoint[name]
    if dtype is not None and (dtype not in DTYPES or stored not in DTYPES):
        raise ValueError(f"Cannot convert {name} from {stored} to {dtype}: the dtypes are {', '.join(DTYPES)}.")
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
            raise ValueError(f"{name} has values too large for {dtype}: choose bfloat16 or float32.")
        array = cast
    return translate(name, array, params)[1]


def _main_dtype(tensors: Sequence[LazyTensor]) -> str:
    """The dtype of most bytes."""
    sizes: Counter[str] = Counter()
    for tensor in tensors:
        sizes[tensor.info.dtype] += tensor.info.nbytes
    return sizes.most_common(1)[0][0]
