"""``mistral-hf info``."""

import json
import os
import platform
import shutil
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import typer

from ..bundled import BUNDLED_CHECKPOINT
from .application import app
from .options import JsonOption

PACKAGES = (
    *("mistral_hf", "torch", "transformers", "tokenizers", "safetensors", "accelerate", "bitsandbytes", "flash-attn"),
    *("peft", "trl", "mistral-common", "jax", "flax", "tensorflow", "keras"),
)
BACKENDS = ("eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3", "flash_attention_4")


@app.command()
def info(as_json: JsonOption = False) -> None:
    """Show versions, the classes of the Auto classes, attention back ends, devices and memory."""
    from ..registration import register, resolved, resolved_names

    register()
    classes = {name: f"{c.__module__}.{c.__qualname__}" for name, (c, _) in (resolved() | resolved_names()).items()}
    state = str(BUNDLED_CHECKPOINT) if BUNDLED_CHECKPOINT.is_dir() else f"missing: {BUNDLED_CHECKPOINT}"
    tables = {
        "Versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "Classes": classes,
        "Attention back ends": {name: _backend_state(name) for name in BACKENDS},
        "Devices": _devices(),
        "Bundled checkpoint": {"tiny-mistral": state},
    }
    if as_json:
        keys = ("versions", "classes", "attention", "devices", "checkpoints")
        typer.echo(json.dumps(dict(zip(keys, tables.values(), strict=True)), indent=2))
    else:
        _print_tables(tables)


def _print_tables(tables: dict[str, dict[str, str]]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(width=None if sys.stdout is not None and sys.stdout.isatty() else 1000)
    for title, rows in tables.items():
        typer.secho(title, bold=True)
        table = Table.grid(padding=(0, 2))
        table.add_column(width=2)
        table.add_column(style="cyan", min_width=36, no_wrap=True)
        table.add_column(overflow="fold")
        for name, value in rows.items():
            table.add_row("", name, escape(value))
        with console.capture() as capture:
            console.print(table)
        for line in capture.get().splitlines():
            typer.echo(line.rstrip())


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _backend_state(name: str) -> str:
    """Whether an attention back end works here, found by running a model of one layer with it."""
    import torch
    from transformers import AutoModelForCausalLM

    from ..configuration_mistral import MistralConfig
    from ..torch.flash_kernels import NAME, find_kernels

    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    if name == "flex_attention" and device.type == "cpu":  # it would have to be compiled, which takes long
        compiler = os.environ.get("CXX", "g++")
        return (
            "usable"
            if shutil.which(compiler)
            else f"not usable: it needs a compiler, and there is no compiler {compiler}"
        )
    config = MistralConfig(
        vocab_size=8,
        hidden_size=64,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
    )
    try:
        model: Any = AutoModelForCausalLM.from_config(config, attn_implementation=name, dtype=torch.bfloat16)
        model.to(device).eval()
        with torch.inference_mode():
            model(torch.zeros(1, 2, dtype=torch.long, device=device))
    except (ImportError, ValueError, RuntimeError) as error:
        return f"not usable: {error}"
    return f"usable: {find_kernels().name}" if name == NAME else "usable"


def _devices() -> dict[str, str]:
    import torch

    names = getattr(os, "sysconf_names", {})
    pages = [os.sysconf(name) if name in names else 0 for name in ("SC_AVPHYS_PAGES", "SC_PHYS_PAGES")]
    memory = _memory(*(count * os.sysconf("SC_PAGE_SIZE") for count in pages)) if all(pages) else "unknown memory"
    cpu = f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}, {memory}"
    accelerators = range(torch.accelerator.device_count())
    kind = torch.accelerator.current_accelerator()
    return {"cpu": cpu, **{f"{kind}:{i}": _memory(*torch.accelerator.get_memory_info(i)) for i in accelerators}}


def _memory(free: int, total: int) -> str:
    return f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
