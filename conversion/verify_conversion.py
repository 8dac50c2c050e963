#!/usr/bin/env python
"""Compare two Mistral checkpoints, each raw or in Hugging Face format."""

from pathlib import Path
from typing import Annotated

import typer

from mistral_hf.convert.console import byte_progress, echo, exit_on_error
from mistral_hf.convert.verify import SAMPLE_TEXT, verify


def main(
    a: Annotated[Path, typer.Argument(help="A raw folder or a Hugging Face one.")],
    b: Annotated[Path, typer.Argument(help="The other folder.")],
    text: Annotated[
        str, typer.Option("--text", help="Text that the tokenizers encode and the models read.")
    ] = SAMPLE_TEXT,
    logits: Annotated[bool, typer.Option("--logits/--no_logits", help="Run both models in float32.")] = True,
    tolerance: Annotated[float, typer.Option("--tolerance", help="Largest relative difference of logits.")] = 1e-4,
) -> None:
    """Compare tensors bit for bit, configuration, tokenizer ids and logits; exit with 1 if anything differs."""
    failed = False
    with exit_on_error(), byte_progress() as progress:
        for check in verify(a, b, text=text, logits=logits, tolerance=tolerance, progress=progress):
            verdict = {True: "same", False: "DIFFERS", None: "not compared"}[check.ok]
            echo(f"{check.name + ':':<15} {verdict}: {check.detail}")
            failed |= check.ok is False
    if failed:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
