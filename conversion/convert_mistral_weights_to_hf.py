#!/usr/bin/env python
"""Convert a raw Mistral checkpoint (or a raw LoRA adapter) to Hugging Face format."""

from pathlib import Path
from typing import Annotated

import typer

from mistral_hf.convert.console import byte_progress, exit_on_error
from mistral_hf.convert.folders import convert_raw_to_hf


def main(
    input_dir: Annotated[Path, typer.Option("--input_dir", help="Folder with params.json and raw weights.")],
    output_dir: Annotated[Path, typer.Option("--output_dir", help="Folder to write; it appears when complete.")],
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="float32, bfloat16 or float16; by default every bit is kept.")
    ] = None,
    max_shard_size: Annotated[
        str | None, typer.Option("--max_shard_size", help="Largest output file of a model.", show_default="5GB")
    ] = None,
    max_position_embeddings: Annotated[
        int | None,
        typer.Option("--max_position_embeddings", help="Needed if params.json and the known models lack it."),
    ] = None,
    rope_theta: Annotated[
        float | None, typer.Option("--rope_theta", help="Needed if params.json and the known models lack it.")
    ] = None,
    tokenizer_version: Annotated[
        str | None, typer.Option("--tokenizer_version", help="Such as v3; overrides the version found in the file.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")] = False,
) -> None:
    """Convert a raw Mistral checkpoint (or a raw LoRA adapter) to Hugging Face format."""
    with exit_on_error(), byte_progress() as progress:
        result = convert_raw_to_hf(
            input_dir,
            output_dir,
            dtype=dtype,
            max_shard_size=max_shard_size,
            max_position_embeddings=max_position_embeddings,
            rope_theta=rope_theta,
            tokenizer_version=tokenizer_version,
            overwrite=overwrite,
            progress=progress,
        )
    typer.echo(result.summary())


if __name__ == "__main__":
    typer.run(main)
