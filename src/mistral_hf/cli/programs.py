"""``mistral-hf run`` and ``mistral-hf serve``: other programs, with this package's models."""

from importlib.util import find_spec
from typing import Annotated

import typer

from .application import app, interruptible

# The rest of the command line belongs to another program, options included.
PASSED_ON = {"ignore_unknown_options": True, "allow_interspersed_args": False}
SERVER_PACKAGES = ("accelerate", "fastapi", "openai", "pydantic", "uvicorn")


@app.command(context_settings={**PASSED_ON, "help_option_names": []})
def serve(
    options: Annotated[list[str] | None, typer.Argument(metavar="OPTIONS", help="Options of the server.")] = None,
) -> None:
    """Serve chats and texts over HTTP, on 127.0.0.1 unless --host is given.

    This is `transformers serve`, with all its options; `mistral-hf serve --help` lists them.
    """
    options = options or []
    missing = [package for package in SERVER_PACKAGES if find_spec(package) is None]
    if missing and "--help" not in options:
        remedy = "which is not installed: pip install 'mistral_hf[serve]' brings it."
        raise ImportError(f"The server needs {' and '.join(missing)}, {remedy}")
    from transformers.cli.serve import Serve

    from ..registration import register

    register()
    server = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    server.command()(Serve)
    with interruptible():
        server(["--host", "127.0.0.1", *options], prog_name="mistral-hf serve")  # a second --host replaces the first


@app.command(context_settings=PASSED_ON)
def run(
    command: Annotated[
        list[str], typer.Argument(metavar="COMMAND", help="SCRIPT.py, -m MODULE or a program, and its arguments.")
    ],
) -> None:
    """Run COMMAND with the package registered in it, and in every Python process that it starts.

    For programs that load models without importing mistral_hf: lm_eval, trl, accelerate launch, torchrun, axolotl.
    """
    from .. import launch

    launch.launch(command)
