"""The model and the tokenizer of a checkpoint; what is wrong with it is said in one line, with the remedy."""

import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer

from .application import check_installed
from .options import Dtype, LoadOptions

DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")


def load(name: str, options: LoadOptions) -> tuple[Any, Any]:
    """The model, in evaluation mode, and the tokenizer of a checkpoint or of an adapter.

    Raises:
        typer.BadParameter: A package is missing, or the checkpoint cannot be loaded.
    """
    _check_folder(name)
    if options.device_map is not None:
        check_installed("--device-map", "bnb", "accelerate")
        _check_device(options.device_map)
    if options.load_in_4bit:
        check_installed("--load-in-4bit", "bnb", "bitsandbytes", "accelerate")
    else:  # the library imports it in any case, and it warns that its 4-bit kernels could be faster
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    import torch
    from transformers import AutoConfig
    from transformers.utils import logging as library_logging

    from ..modeling_mistral import MistralForCausalLM
    from ..registration import register

    register()
    if options.quiet:
        library_logging.set_verbosity_error()
    with _blamed_on("--model", f"{name} cannot be loaded"):
        base = _base(name, options.revision)
        revision = options.revision if base == name else None
        config = AutoConfig.from_pretrained(base, revision=revision)
    if options.attn_implementation is not None:
        _check_attention(config, options.attn_implementation)
    with _library_bars(shown=not options.quiet and sys.stderr is not None and sys.stderr.isatty()):
        tokenizer = _load_tokenizer(name, base, options.revision)
        model = _load_model(name, options)
    if not isinstance(model, MistralForCausalLM) and not options.quiet:
        typer.echo(f"Note: {name} is not a Mistral; {type(model).__name__} of the library runs it.", err=True)
    if options.device_map is None and not options.load_in_4bit and torch.accelerator.is_available():
        model.to(torch.accelerator.current_accelerator())
    return model.eval(), tokenizer


def _check_folder(name: str) -> None:
    """Check that a folder is complete; other names are ids on the hub, in the form ``name`` or ``owner/name``."""
    folder = Path(name)
    if not folder.exists():
        if name.startswith(".") or folder.is_absolute() or len(folder.parts) > 2:
            raise typer.BadParameter(f"There is no folder {folder}: give a folder or a hub id.", param_hint="--model")
        return
    if (folder / "config.json").is_file() or (folder / "adapter_config.json").is_file():
        return
    if (folder / "params.json").is_file():
        problem = f"{folder} holds raw weights: convert them first, with mistral-hf convert {folder} HF-FOLDER."
    elif folder.suffix == ".gguf" or any(folder.glob("*.gguf")):
        problem = f"{folder} holds GGUF weights, for llama.cpp: give the checkpoint that they were made from."
    else:
        problem = f"{folder} has no config.json: give the folder that holds it and the weights."
    raise typer.BadParameter(problem, param_hint="--model")


def _check_device(name: str) -> None:
    import torch

    if name in DEVICE_MAPS:
        return
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    known = ["cpu", *([accelerator.type] if accelerator is not None else [])]
    try:
        device = torch.device(name)
        possible = device.type in known and (device.index or 0) < max(1, torch.accelerator.device_count())
    except RuntimeError:
        possible = False
    if not possible:
        raise typer.BadParameter(
            f"There is no device {name!r} here: use {', '.join((*known, *DEVICE_MAPS))}.", param_hint="--device-map"
        )


def _check_attention(config: Any, implementation: str) -> None:
    """Build the model without memory, so that an error is that of the back end."""
    import torch
    from transformers import AutoModelForCausalLM

    with _blamed_on("--attn-implementation", f"{implementation} cannot be used"), torch.device("meta"):
        AutoModelForCausalLM.from_config(config, attn_implementation=implementation)


def _base(name: str, revision: str | None) -> str:
    """The checkpoint that holds the configuration: that of the base model for an adapter."""
    from transformers.utils import find_adapter_config_file

    file = find_adapter_config_file(name, revision=revision)
    if file is None:
        return name
    check_installed("--model", "train", "peft")
    base = json.loads(Path(file).read_text("utf-8")).get("base_model_name_or_path")
    if not isinstance(base, str):
        raise ValueError(f"{file} has no base_model_name_or_path: add the folder or hub id of the base model.")
    return base


def _load_tokenizer(name: str, base: str, revision: str | None) -> Any:
    """The tokenizer of the checkpoint, or that of the base model for an adapter without one."""
    from transformers import AutoTokenizer

    folder = Path(name)
    lacks_tokenizer = folder.is_dir() and not any((folder / file).is_file() for file in TOKENIZER_FILES)
    if lacks_tokenizer and base == name:
        raise typer.BadParameter(
            f"{folder} has no tokenizer: copy tokenizer.json and tokenizer_config.json of its base model into it.",
            param_hint="--model",
        )
    source = base if lacks_tokenizer else name
    with _blamed_on("--model", f"The tokenizer of {source} cannot be loaded"):
        return AutoTokenizer.from_pretrained(source, revision=revision if source == name else None)


def _load_model(name: str, options: LoadOptions) -> Any:
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quantization = {}  # an argument of None would make the library ignore how a quantized checkpoint was saved
    if options.load_in_4bit:
        compute_dtype = torch.bfloat16 if options.dtype is Dtype.auto else getattr(torch, options.dtype.value)
        quantization["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute_dtype
        )
    with _blamed_on("--model", f"{name} cannot be loaded"):
        try:
            return AutoModelForCausalLM.from_pretrained(
                name,
                revision=options.revision,
                dtype=options.dtype.value,
                device_map=options.device_map,
                attn_implementation=options.attn_implementation,
                **quantization,
            )
        except SafetensorError as error:
            files = ", ".join(_damaged_files(Path(name))) or "a safetensors file"
            raise ValueError(f"{files} is incomplete or damaged ({error}): copy or download it again.") from error


def _damaged_files(folder: Path) -> Iterator[str]:
    from safetensors import SafetensorError, safe_open

    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, "pt"):
                pass
        except SafetensorError:
            yield file.name


@contextmanager
def _blamed_on(option: str, problem: str) -> Iterator[None]:
    """Whatever goes wrong in the block is a fault of this option's value."""
    try:
        yield
    except typer.BadParameter:
        raise
    except Exception as error:
        raise typer.BadParameter(f"{problem}: {error or type(error).__name__}", param_hint=option) from error


@contextmanager
def _library_bars(shown: bool) -> Iterator[None]:
    """Within the block, the library shows bars or does not."""
    from transformers.utils import logging as library_logging

    before = library_logging.is_progress_bar_enabled()
    if before and not shown:
        library_logging.disable_progress_bar()
    try:
        yield
    finally:
        if before:
            library_logging.enable_progress_bar()
