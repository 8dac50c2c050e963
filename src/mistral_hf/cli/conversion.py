"""``mistral-hf convert`` and ``mistral-hf verify``; the scripts of ``conversion/`` share their options."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .application import app, interruptible
from .options import ComparisonOptions, ConversionOptions, FolderA, FolderB, RawOptions

if TYPE_CHECKING:
    from ..convert.verify import Check


class Format(str, Enum):
    """Formats of a checkpoint folder."""

    hf = "hf"
    raw = "raw"


FORMATS = {Format.hf: ("config.json", "adapter_config.json"), Format.raw: ("params.json",)}


@app.command()
def convert(
    options: ConversionOptions,
    raw: RawOptions,
    input_dir: Annotated[
        Path, typer.Argument(metavar="INPUT_DIR", help="Folder of a model or of a LoRA adapter, raw or Hugging Face.")
    ],
    output_dir: Annotated[
        Path, typer.Argument(metavar="OUTPUT_DIR", help="Folder to write; it appears when complete.")
    ],
    to: Annotated[
        Format | None, typer.Option(help="Format of the output.", show_default="the one that the input is not in")
    ] = None,
) -> None:
    """Convert raw Mistral weights, or a raw LoRA adapter, to Hugging Face format, or back."""
    if (to or _other_format(input_dir)) is Format.hf:
        raw_to_hf(input_dir, output_dir, options, raw)
    else:
        given = [f"--{name.replace('_', '-')}" for name, value in vars(raw).items() if value is not None]
        if given:
            raise typer.BadParameter(f"{input_dir} is not raw: leave it out.", param_hint=", ".join(given))
        hf_to_raw(input_dir, output_dir, options)


def _other_format(folder: Path) -> Format:
    """The format that a folder is not in."""
    found = [name for name, files in FORMATS.items() if any((folder / file).is_file() for file in files)]
    if len(found) == 2:
        raise typer.BadParameter(f"{folder} holds both formats: add --to hf or --to raw.", param_hint="INPUT_DIR")
    return Format.raw if found == [Format.hf] else Format.hf


def raw_to_hf(input_dir: Path, output_dir: Path, options: ConversionOptions, raw: RawOptions) -> None:
    """Convert a raw folder, with a bar."""
    from ..convert import convert_raw_to_hf

    with interruptible(), byte_progress(options.quiet) as progress:
        result = convert_raw_to_hf(input_dir, output_dir, **options.keywords(), **vars(raw), progress=progress)
    typer.echo(result.summary())


def hf_to_raw(input_dir: Path, output_dir: Path, options: ConversionOptions) -> None:
    """Convert a folder in the Hugging Face format, with a bar."""
    from ..convert import convert_hf_to_raw

    with interruptible(), byte_progress(options.quiet) as progress:
        result = convert_hf_to_raw(input_dir, output_dir, **options.keywords(), progress=progress)
    typer.echo(result.summary())


@app.command()
def verify(options: ComparisonOptions, a: FolderA, b: FolderB) -> None:
    """Compare two folders: tensors bit for bit, configuration, tokenizer ids and logits; exit with 1 if any differs."""
    from ..convert.verify import SAMPLE_TEXT
    from ..convert.verify import verify as checks

    if options.logits:
        from ..registration import register

        register()
    text = SAMPLE_TEXT if options.text is None else options.text
    differs = False
    with interruptible(), byte_progress(options.quiet) as progress:
        for check in checks(a, b, text=text, logits=options.logits, tolerance=options.tolerance, progress=progress):
            _show(check)
            differs |= check.ok is False
    if differs:
        raise typer.Exit(1)


def _show(check: "Check") -> None:
    from tqdm.auto import tqdm

    verdict = {True: "same", False: "DIFFERS", None: "not compared"}[check.ok]
    with tqdm.external_write_mode():
        typer.echo(f"{check.name + ':':<15} {verdict}: {check.detail}")


@contextmanager
def byte_progress(quiet: bool) -> Iterator[Callable[[int, int], None] | None]:
    """A progress callback that draws a bar in a terminal, once there is progress."""
    from tqdm.auto import tqdm

    bars: list[Any] = []

    def report(done: int, total: int) -> None:
        if not bars:
            bars.append(tqdm(total=total, unit="B", unit_scale=True, unit_divisor=1000, disable=None, file=sys.stderr))
        bars[0].update(done - bars[0].n)

    try:
        yield None if quiet else report
    finally:
        for bar in bars:
            bar.close()
