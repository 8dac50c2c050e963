#!/usr/bin/env python
"""Compare two Mistral checkpoints, each raw or in Hugging Face format; `mistral-hf verify` under another name."""

from mistral_hf.cli.application import Application
from mistral_hf.cli.conversion import verify

app = Application(add_completion=False)
app.command()(verify)

if __name__ == "__main__":
    app()
