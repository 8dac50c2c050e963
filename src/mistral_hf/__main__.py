"""``mistral-hf``, and ``python -m mistral_hf``."""

import os
import signal
import sys


def main() -> None:
    """Run the command line; Ctrl-C ends it on the spot, since an import can turn a KeyboardInterrupt into any error."""
    signal.signal(signal.SIGINT, lambda number, frame: os._exit(130))
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:  # closed by the caller
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]  # a text stream
    from .cli import app

    app(prog_name="mistral-hf")


if __name__ == "__main__":
    main()
