"""``mistral-hf``, and ``python -m mistral_hf``."""

import os
import signal
import sys


def main() -> None:
    """Run the command line; Ctrl-C ends it on the spot, since an import can turn a KeyboardInterrupt into any error."""
    signal.signal(signal.SIGINT, lambda number, frame: os._exit(130))
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:  # closed by the caller
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    from .cli import app

    try:
        app(prog_name="mistral-hf")
    finally:
        _flush()


def _flush() -> None:
    """Flush standard output while an error can still be shown; Python's own attempt would be a traceback."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            print(f"Error: standard output: {error.strerror}.", file=sys.stderr)
            sys.exit(2)


if __name__ == "__main__":
    main()
