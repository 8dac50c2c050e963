#!/usr/bin/env python
"""Convert a Hugging Face Mistral checkpoint (or a PEFT adapter) to the raw format."""

from pathlib import Path
from typing import Annotated

import typer

from mistral_hf.cli.application import Application
from mistral_hf.cli.conversion import hf_to_raw
from mistral_hf.cli.options import ConversionOptions

app = Application(add_completion=False)


@app.command()
def main(
    input_dir: Annotated[Path, typer.Option(help="Folder with config.json and safetensors weights.")],
    output_dir: Annotated[Path, typer.Option(help="Folder to write; it appears when complete.")],
    options: ConversionOptions,
) -> None:
    """Convert a Hugging Face Mistral checkpoint (or a PEFT adapter) to the raw format."""
    hf_to_raw(input_dir, output_dir, options)


if __name__ == "__main__":
    app()
