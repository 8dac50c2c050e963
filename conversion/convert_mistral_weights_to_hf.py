#!/usr/bin/env python
"""Convert a raw Mistral checkpoint (or a raw LoRA adapter) to Hugging Face format."""

from pathlib import Path
from typing import Annotated

import typer

from mistral_hf.cli.application import Application
from mistral_hf.cli.conversion import raw_to_hf
from mistral_hf.cli.options import ConversionOptions, RawOptions

app = Application(add_completion=False)


@app.command()
def main(
    input_dir: Annotated[Path, typer.Option(help="Folder with params.json and raw weights.")],
    output_dir: Annotated[Path, typer.Option(help="Folder to write; it appears when complete.")],
    options: ConversionOptions,
    raw: RawOptions,
) -> None:
    """Convert a raw Mistral checkpoint (or a raw LoRA adapter) to Hugging Face format."""
    raw_to_hf(input_dir, output_dir, options, raw)


if __name__ == "__main__":
    app()
