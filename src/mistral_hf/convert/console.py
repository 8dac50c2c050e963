"""The terminal side of the commands that move weights: a progress bar over bytes, and errors on one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer
from tqdm.auto import tqdm

from ..checkpoints.writer import Progress
from ..compatibility import one_line


@contextmanager
def byte_progress() -> Iterator[Progress]:
    """A progress callback that draws a bar with bytes per second and the remaining time, if there is a terminal."""
    with tqdm(unit="B", unit_scale=True, unit_divisor=1000, disable=None) as bar:

        def report(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield report


def echo(line: str) -> None:
    """Print a line above the progress bar."""
    with tqdm.external_write_mode():
        typer.echo(line)


@contextmanager
def exit_on_error() -> Iterator[None]:
    """Turn an error whose message explains it into one line and exit code 1."""
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        typer.echo(f"Error: {one_line(str(error))}", err=True)
        raise typer.Exit(1) from error
