"""How commands are parsed and how they end: options in groups, errors on one line, exit codes 0, 2 and 130."""

import dataclasses
import functools
import inspect
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from typing import Annotated, Any, TypeVar

import typer
from typer.core import TyperCommand, TyperGroup

from ..compatibility import one_line

ERROR, INTERRUPTED = 2, 130
TRACEBACK = "MISTRAL_HF_TRACEBACK"

Function = TypeVar("Function", bound=Callable[..., Any])


def say_error(message: object) -> None:
    typer.secho(f"Error: {one_line(str(message))}", err=True, fg=typer.colors.RED)


def say_failure(error: Exception) -> None:
    """Show an error; one that nobody foresaw with its type, and with the way to see its traceback."""
    foreseen = isinstance(error, OSError | ValueError | ImportError | MemoryError | OverflowError)
    foreseen |= type(error).__module__ == "huggingface_hub.errors"  # of the fields of a configuration, among others
    if isinstance(error, typer.TyperException):
        say_error(error.format_message())
    elif foreseen and str(error):
        say_error(error)
    else:
        say_error(f"{type(error).__name__}: {one_line(str(error))} ({TRACEBACK}=1 shows where.)")


class _OneLineErrors:
    """A command, or a group of them, that ends with one line instead of a traceback."""

    def main(self, *args: Any, standalone_mode: bool = True, **options: Any) -> Any:
        run: Callable[..., Any] = functools.partial(super().main, *args, standalone_mode=False, **options)  # type: ignore[misc]
        if not standalone_mode:
            return run()
        try:
            code = run()
        except Exception as error:
            if os.environ.get(TRACEBACK) == "1":
                raise
            say_failure(error)
            code = ERROR
        sys.exit(code if isinstance(code, int) else 0)


class Command(_OneLineErrors, TyperCommand):
    """A command with errors of one line."""


class Group(_OneLineErrors, TyperGroup):
    """A group of commands with errors of one line."""


def flat(function: Function) -> Function:
    """A command whose parameters that are dataclasses are replaced by their fields, one option each."""
    parameters = inspect.signature(function).parameters
    groups: dict[str, Any] = {
        name: p.annotation for name, p in parameters.items() if dataclasses.is_dataclass(p.annotation)
    }

    @functools.wraps(function)
    def command(**values: Any) -> Any:
        grouped = {
            name: group(**{field.name: values.pop(field.name) for field in dataclasses.fields(group)})
            for name, group in groups.items()
        }
        return function(**values, **grouped)

    options = [p for name, p in parameters.items() if name not in groups]
    for group in groups.values():
        options += inspect.signature(group).parameters.values()
    options = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in options]
    command.__signature__ = inspect.Signature(options)  # type: ignore[attr-defined]  # typer reads it
    command.__annotations__ = {}
    return command  # type: ignore[return-value]  # its signature was replaced


class Application(typer.Typer):
    """Commands whose options may be dataclasses, and are spelled with dashes or underscores."""

    def __init__(self, **options: Any) -> None:
        settings = {"token_normalize_func": lambda token: token.replace("_", "-")}
        super().__init__(cls=Group, context_settings=settings, pretty_exceptions_enable=False, **options)

    def command(self, *args: Any, **options: Any) -> Callable[[Function], Function]:
        add = super().command(*args, cls=Command, **options)

        def added(function: Function) -> Function:
            add(flat(function))
            return function

        return added


app = Application(name="mistral-hf", help="Run Mistral checkpoints through Hugging Face Transformers with mistral_hf.")


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"mistral-hf {version('mistral_hf')}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _start(
    context: typer.Context,
    show_version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit(ERROR)


@contextmanager
def interruptible() -> Iterator[None]:
    """Within the block, Ctrl-C raises KeyboardInterrupt; before and after it, ``mistral-hf`` ends on the spot."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def check_installed(option: str, extra: str, *packages: str) -> None:
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise typer.BadParameter(
            f"It needs {' and '.join(missing)}, which is not installed: pip install 'mistral_hf[{extra}]' brings it.",
            param_hint=option,
        )


def utf8(text: str | bytes, hint: str) -> str:
    """A text of the command line or of standard input, whose bytes are UTF-8 whatever the locale is."""
    try:
        return (text if isinstance(text, bytes) else os.fsencode(text)).decode("utf-8")
    except UnicodeError as error:
        raise typer.BadParameter(f"It is not UTF-8 ({error}): convert it, as iconv does.", param_hint=hint) from error


def read_stdin(hint: str) -> str:
    if sys.stdin is None:
        raise typer.BadParameter("Standard input is closed: redirect it from a file.", param_hint=hint)
    return utf8(sys.stdin.buffer.read(), hint)
