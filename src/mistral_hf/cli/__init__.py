"""The command line. Importing it imports no framework: each command imports what it needs when it runs."""

from . import chat, conversion, generation, info, programs  # noqa: F401 - they add their commands
from .application import app

__all__ = ["app"]
