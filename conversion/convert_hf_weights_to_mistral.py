#!/usr/bin/env python
"""Convert a Hugging Face Mistral checkpoint (or a PEFT adapter) to the raw format."""

from pathlib import Path
from typing import Annotated

import typer

from mistral_hf.convert.console import byte_progress, exit_on_error
from mistral_hf.convert.folders import convert_hf_to_raw


def main(
    input_dir: Annotated[Path, typer.Option("--input_dir", help="Folder with config.json and safetensors weights.")],
    output_dir: Annotated[Path, typer.Option("--output_dir", help="Folder to write; it appears when complete.")],
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="float32, bfloat16 or float16; by default every bit is kept.")
    ] = None,
    max_shard_size: Annotated[
        str | None, typer.Option("--max_shard_size", help="Largest output file; by default all weights are in one.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")] = False,
) -> None:
    """Convert a Hugging Face Mistral checkpoint (or a PEFT adapter) to the raw format."""
    with exit_on_error(), byte_progress() as progress:
        result = convert_hf_to_raw(
            input_dir, output_dir, dtype=dtype, max_shard_size=max_shard_size, overwrite=overwrite, progress=progress
        )
    typer.echo(result.summary())


if __name__ == "__main__":
    typer.run(main)
