"""Options that several commands have, each defined once; a dataclass is a group of them."""

from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

SAMPLING = ("temperature", "top_k", "top_p", "min_p")


class Dtype(str, Enum):
    """Dtypes of weights; ``auto`` is that of the checkpoint."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


DTYPES = ", ".join(each.value for each in Dtype)


def value(metavar: str, help: str, *names: str, default: str | None = None) -> Any:
    """An option that takes a text; `default` says what applies without it."""
    return typer.Option(*names, metavar=metavar, help=help, show_default=default or True)


def number(help: str, low: float, high: float, metavar: str = "X", **options: Any) -> Any:
    """An option that takes a number between bounds, which the help leaves out."""

    def check(given: float | None) -> float | None:
        if given is not None and not low <= given <= high:
            raise typer.BadParameter(f"{given} must lie in [{low}, {high}].")
        return given

    return typer.Option(help=help, callback=check, metavar=metavar, **options)


def count(help: str, high: int = 1_000_000, low: int = 1, **options: Any) -> Any:
    """An option that takes a whole number between bounds."""
    return number(help, low, high, "N", **options)


QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Show results and errors only.")]
StatsOption = Annotated[bool, typer.Option("--stats", help="Show tokens and tokens a second on standard error.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@dataclass
class LoadOptions:
    """How a checkpoint is loaded."""

    revision: Annotated[str | None, value("NAME", "Branch, tag or commit of a checkpoint on the hub.")] = None
    dtype: Annotated[Dtype, value("DTYPE", f"{DTYPES}; auto is that of the checkpoint.")] = Dtype.auto
    device_map: Annotated[
        str | None,
        typer.Option(
            metavar="DEVICE", help="Device, such as auto, cpu or cuda:1.", show_default="the accelerator, or the CPU"
        ),
    ] = None
    attn_implementation: Annotated[
        str | None,
        value("NAME", "Attention back end; `mistral-hf info` lists them.", default="sdpa"),
    ] = None
    load_in_4bit: Annotated[
        bool, typer.Option("--load-in-4bit", help="Quantize to 4 bits (NF4) with bitsandbytes.")
    ] = False
    quiet: QuietOption = False


@dataclass
class GenerationOptions:
    """How tokens are chosen."""

    do_sample: Annotated[
        bool | None,
        typer.Option("--do-sample/--greedy", help="Sample tokens, or take the likeliest.", show_default="checkpoint's"),
    ] = None
    temperature: Annotated[float | None, number("Above 1 is more random, below 1 less.", 0.01, 100)] = None
    top_k: Annotated[int | None, count("Sample from this many of the likeliest tokens.")] = None
    top_p: Annotated[float | None, number("Sample from this share of probability.", 0, 1)] = None
    min_p: Annotated[float | None, number("Smallest probability, relative to that of the likeliest token.", 0, 1)] = (
        None
    )
    repetition_penalty: Annotated[float | None, number("Above 1 discourages repetition.", 0.01, 100)] = None
    prefill_chunk_size: Annotated[int | None, count("Read the prompt in pieces of this many tokens.")] = None
    seed: Annotated[int | None, count("Seed that makes sampling repeatable.", 2**32 - 1, low=0)] = None

    def keywords(self, **others: Any) -> dict[str, Any]:
        """Keywords of ``generate``: the options that were given, and ``do_sample`` where they imply it."""
        options = {**vars(self), **others}
        given = {name: value for name, value in options.items() if value is not None and name != "seed"}
        sampling = [f"--{name.replace('_', '-')}" for name in SAMPLING if name in given]
        if self.do_sample is False and sampling:
            raise typer.BadParameter(f"It contradicts {', '.join(sampling)}: leave one out.", param_hint="--greedy")
        if self.do_sample is not None or sampling:
            given["do_sample"] = self.do_sample is not False
        return given


@dataclass
class ConversionOptions:
    """How a folder is converted."""

    dtype: Annotated[Dtype, value("DTYPE", f"{DTYPES}; auto keeps every bit.")] = Dtype.auto
    max_shard_size: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE", help="Largest output file of a model.", show_default="5GB; of raw weights no limit"
        ),
    ] = None
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what a conversion wrote before.")] = False
    quiet: QuietOption = False

    def keywords(self) -> dict[str, Any]:
        """Keywords of the functions that convert."""
        return {
            "dtype": None if self.dtype is Dtype.auto else self.dtype.value,
            "max_shard_size": self.max_shard_size,
            "overwrite": self.overwrite,
        }


@dataclass
class RawOptions:
    """What raw folders may leave out."""

    max_position_embeddings: Annotated[
        int | None, count("Needed if params.json and the known models lack it.", 2**31 - 1)
    ] = None
    rope_theta: Annotated[float | None, number("Needed if params.json and the known models lack it.", 1, 1e12)] = None
    tokenizer_version: Annotated[
        str | None, value("V", "Such as v3; overrides the version found in the tokenizer's file.")
    ] = None


FolderA = Annotated[Path, typer.Argument(help="A raw folder or a Hugging Face one.", metavar="A")]
FolderB = Annotated[Path, typer.Argument(help="The other folder.", metavar="B")]


@dataclass
class ComparisonOptions:
    """How two folders are compared."""

    text: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT", help="Text that tokenizers and models read.", show_default="a sample of many scripts"
        ),
    ] = None
    logits: Annotated[bool, typer.Option("--logits/--no-logits", help="Run both models in float32.")] = True
    tolerance: Annotated[float, number("Largest relative difference of logits.", 0, 1)] = 1e-4
    quiet: QuietOption = False
