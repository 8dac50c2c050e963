"""Whole checkpoint folders for the JAX and TensorFlow ports: finding them, matching them with a model, saving."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import GenerationConfig

from ..compatibility import BASE_PREFIX, HEADS, CheckpointError, check_decoder_weights
from ..configuration_mistral import MistralConfig
from .reader import Array, Checkpoint, Shape, open_checkpoint
from .writer import MANIFEST, LazyTensor, atomic_folder, write_checkpoint, write_manifest

logger = logging.getLogger(__name__)
_HUB_FILES = ("*.json", "*.safetensors")
# Weights that a loader may find in a folder, with or without ".index.json"; beside new ones they would be stale.
_WEIGHT_FILES = (
    *("model*.safetensors", "pytorch_model*.bin", "tf_model*.h5", "flax_model*.msgpack"),
    *("consolidated*.safetensors", "consolidated*.pth"),
)


def locate(name_or_path: str | Path, **hub_options: Any) -> Path:
    """The folder of a checkpoint; one on the hub is downloaded, or taken from the cache of the hub's library.

    Args:
        name_or_path: A folder, or an id on the hub.
        **hub_options: Of ``huggingface_hub.snapshot_download``: ``revision``, ``token``, ``cache_dir``,
            ``local_files_only``, ...

    Raises:
        FileNotFoundError: There is neither such a folder nor such a model on the hub, or the hub cannot be reached.
    """
    folder = Path(name_or_path)
    if folder.is_dir():
        return folder
    try:
        return Path(snapshot_download(str(name_or_path), allow_patterns=list(_HUB_FILES), **hub_options))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, ConnectionError) as error:
        raise FileNotFoundError(
            f"{str(name_or_path)!r} is neither a folder nor a model that can be downloaded ({error}). Check the name; a"
            " gated model needs `hf auth login`."
        ) from error


@dataclass(frozen=True)
class MatchedWeights:
    """The tensors of a checkpoint by the names of the model that they load into.

    Attributes:
        missing: Head weights that the checkpoint lacks, and that need initial values.
        unexpected: Head weights that the model does not have.
    """

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    _names: Mapping[str, str]
    _checkpoint: Checkpoint

    def __len__(self) -> int:
        return len(self._names)

    def stream(self) -> Iterator[tuple[str, Array]]:
        """Yield the model's names with their values, one tensor in memory at a time."""
        for name, stored in self._names.items():
            yield name, self._checkpoint.read(stored)


@contextmanager
def open_weights(folder: str | Path, wanted: Mapping[str, Shape]) -> Iterator[MatchedWeights]:
    """Match the safetensors files of a folder with a model, whichever heads the two have.

    Args:
        folder: A checkpoint in the Hugging Face format.
        wanted: Shapes of the model's tensors, by their Hugging Face names (with the prefix ``model.`` unless it is a
            bare `MistralModel`); a tied output layer is left out.

    Yields:
        The tensors that model and checkpoint share; a warning names the others.

    Raises:
        CheckpointError: Weights of the decoder are missing or unknown, or a tensor has another shape.
    """
    with open_checkpoint(folder) as checkpoint:
        names, unexpected = _match(checkpoint, wanted)
        missing = [name for name in wanted if name not in names]
        check_decoder_weights(folder, missing, unexpected)
        for name, stored in names.items():
            if checkpoint[stored].shape != tuple(wanted[name]):
                raise CheckpointError(
                    f"{folder}: {stored} has shape {checkpoint[stored].shape}, but the configuration says"
                    f" {tuple(wanted[name])}: config.json and the weights do not belong together."
                )
        if missing:
            logger.warning("%s lacks %s: initialised at random, so train them.", folder, ", ".join(missing))
        if unexpected:
            logger.warning("%s has %s, which this model does not have: left out.", folder, ", ".join(unexpected))
        yield MatchedWeights(tuple(missing), tuple(unexpected), names, checkpoint)


def _match(found: Collection[str], wanted: Collection[str]) -> tuple[dict[str, str], list[str]]:
    """The wanted names, each with its name in the checkpoint, and the names in the checkpoint that are left over."""
    theirs, ours = (any(name.startswith(BASE_PREFIX) for name in names) for names in (found, wanted))

    def translate(name: str) -> str:
        if theirs and not ours:
            return name.removeprefix(BASE_PREFIX)
        return BASE_PREFIX + name if ours and not theirs and not name.startswith(HEADS) else name

    names = {translate(stored): stored for stored in found if "rotary_emb" not in stored}
    left = [stored for name, stored in names.items() if name not in wanted]
    return {name: names[name] for name in wanted if name in names}, left


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
    """Write a checkpoint that every framework loads.

    A checkpoint that is there already is replaced. Its other files and folders stay (tokenizer, model card,
    ``original/``), its weights of any format do not, and its manifest, if it has one, is written again.

    Args:
        folder: The target, which appears only when it is complete.
        config: The model's configuration.
        generation_config: Defaults of ``generate``, or None.
        tensors: The weights, by their Hugging Face names.
        architecture: The PyTorch class of this model, such as ``"MistralForCausalLM"``.
        dtype: Of the weights, such as ``"bfloat16"``.
        max_shard_size: As of `write_checkpoint`.

    Raises:
        FileExistsError: The folder holds something other than a checkpoint in the Hugging Face format.
    """
    fields = {**config.to_dict(), "architectures": [architecture], "dtype": dtype}
    fields.pop("_name_or_path", None)
    needs = sum(tensor.info.nbytes for tensor in tensors)
    with atomic_folder(folder, check_replaceable=_check_hf_folder, needs_bytes=needs) as work:
        digests = write_checkpoint(work, tensors, max_shard_size=max_shard_size)
        (work / "config.json").write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", "utf-8")
        if generation_config is not None:
            generation_config.save_pretrained(work)
        keep_other_files(Path(folder), work)
        if (Path(folder) / MANIFEST).is_file():
            write_manifest(work, digests)


def _check_hf_folder(folder: Path) -> None:
    """Raise unless a folder holds a checkpoint in the Hugging Face format; its other files are kept."""
    if not (folder / "config.json").is_file():
        raise FileExistsError(
            f"{folder} is not a checkpoint in the Hugging Face format (it holds no config.json), so it is not replaced:"
            " remove it yourself, or save to another folder."
        )


def keep_other_files(old: Path, new: Path) -> None:
    """Put the files and folders of a checkpoint that are not weights into the one that replaces it."""
    for path in old.iterdir() if old.is_dir() else ():
        target = new / path.name
        is_weights = any(fnmatch(path.name.removesuffix(".index.json"), pattern) for pattern in _WEIGHT_FILES)
        if is_weights or path.name == MANIFEST or target.exists():
            continue
        if path.is_symlink():
            target.symlink_to(path.readlink())
        elif path.is_dir():
            shutil.copytree(path, target, symlinks=True, copy_function=_link_or_copy)
        elif path.is_file():
            _link_or_copy(path, target)


def _link_or_copy(source: str | Path, target: str | Path) -> None:
    """Give a file a second name, which costs nothing and outlives the first; copy it where links are not possible."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
