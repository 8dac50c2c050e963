"""Checkpoint folders with damage: small folders of every kind, and the rule for what a conversion may do with them."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from mistral_hf.checkpoints.reader import open_checkpoint
from mistral_hf.checkpoints.writer import check_manifest
from mistral_hf.compatibility import one_line
from mistral_hf.convert.config import config_to_params
from mistral_hf.convert.folders import convert_hf_to_raw, convert_raw_to_hf, is_adapter
from mistral_hf.convert.lora import lora_config_to_peft
from mistral_hf.convert.params import normalize_params
from mistral_hf.convert.tensors import check_adapter, check_tensors, hf_shapes, raw_shapes
from tests.helpers.checkpoint_files import read_json
from tests.helpers.raw_reference import GENERATIONS, raw_tensors, write_raw, write_raw_lora

SECONDS = 20  # for one conversion, which takes less than one
PARAMS = GENERATIONS["Ministral 3"] | {"sliding_window": 6, "llama_4_scaling": None}
KINDS = ("safetensors", "sharded", "pth", "pth-2", "hf", "hf-sharded", "lora", "peft")


def write_folders(parent: Path) -> dict[str, Path]:
    """A folder of each kind, all of which convert: raw ones by the name of their layout, and what becomes of them."""
    tensors = raw_tensors(PARAMS)
    folders = {layout: write_raw(parent / layout, PARAMS, tensors, layout) for layout in KINDS[:4]}
    convert_raw_to_hf(folders["safetensors"], parent / "hf")
    convert_raw_to_hf(folders["safetensors"], parent / "hf-sharded", max_shard_size="20KB")
    write_raw_lora(parent / "lora")
    convert_raw_to_hf(parent / "lora", parent / "peft")
    shutil.copyfile(parent / "hf/config.json", parent / "peft/config.json")
    for name in ("hf", "hf-sharded", "peft"):
        (parent / name / "manifest.json").unlink()
    return {kind: parent / kind for kind in KINDS}


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the content of a JSON file."""
    content = read_json(path)
    change(content)
    path.write_text(json.dumps(content))


def edit_header(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the header of a safetensors file, whose length stays that of the text."""
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    change(header)
    write_header(path, json.dumps(header).encode(), data[end:])


def write_header(path: Path, header: bytes, values: bytes) -> None:
    """Write a safetensors file with any header."""
    path.write_bytes(len(header).to_bytes(8, "little") + header + values)


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Fail if the block takes longer."""

    def fail(*_: object) -> None:
        pytest.fail(f"not finished after {seconds} s")

    previous = signal.signal(signal.SIGALRM, fail)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def convert(source: Path, output: Path) -> str | None:
    """Convert a folder as the commands do: what they print if they refuse it, or None for an output that is whole.

    Anything else fails: an exception, a half-made folder, an output that cannot be loaded, or one that takes long.
    """
    is_raw = not any((source / name).exists() for name in ("config.json", "adapter_config.json"))
    before = sorted(os.listdir(output.parent))
    error = refusal(lambda: (convert_raw_to_hf if is_raw else convert_hf_to_raw)(source, output))
    if error is not None:
        assert sorted(os.listdir(output.parent)) == before
        return error
    check_manifest(output)
    check_loads(output)
    return None


def refusal(function: Callable[[], object]) -> str | None:
    """The line that a command prints if a function refuses its input, or None."""
    try:
        with time_limit(SECONDS):
            function()
    except (ValueError, OSError) as error:
        message = str(error)
    else:
        return None
    assert len(message) < 1500
    line = one_line(message)
    assert line.isprintable()
    return line


def check_loads(output: Path) -> None:
    """Load what a conversion wrote with the libraries that read it."""
    for file in output.glob("*.safetensors"):
        load_file(file)
    if (output / "adapter_config.json").exists():
        assert read_json(output / "adapter_config.json")["r"] >= 1
    elif (output / "config.json").exists():
        config = AutoConfig.from_pretrained(output)
        with open_checkpoint(output) as checkpoint:
            check_tensors(checkpoint.shapes, hf_shapes(config_to_params(config.to_dict())), str(output))
        AutoModelForCausalLM.from_pretrained(output)
    else:
        content = read_json(output / "params.json")
        params = normalize_params(content)
        with open_checkpoint(output, "lora" if is_adapter(output) else "consolidated") as checkpoint:
            if is_adapter(output):
                lora_config_to_peft(content, check_adapter(checkpoint.shapes, params, str(output)), checkpoint)
            else:
                check_tensors(checkpoint.shapes, raw_shapes(params), str(output))
