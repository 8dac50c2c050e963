"""Starts a program with this package registered in it, and in every Python process that it starts.

The folder `startup`, first in ``PYTHONPATH``, holds a ``sitecustomize`` that Python imports when it starts.
"""

import os
import shutil
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

STARTUP = Path(__file__).with_name("startup")

NOT_EXECUTABLE, NOT_FOUND = 126, 127  # exit codes of shells


def launch(command: Sequence[str]) -> NoReturn:
    """Become the program, whose signals and exit code are then those of this process.

    Args:
        command: A script (``["train.py", ...]``), options of Python (``["-m", "module", ...]``) or a program and its
            arguments (``["lm_eval", ...]``).

    Raises:
        SystemExit: There is no such program, or it cannot be run; on Windows also the program's exit code.
    """
    arguments = resolve(command)
    environment = with_registration(os.environ)
    try:
        if os.name == "nt":  # there, exec would start a second process and end this one
            raise SystemExit(run(arguments, environment))
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # Python ignores it, and the program would inherit that
        os.execvpe(arguments[0], arguments, environment)
    except OSError as error:
        _fail(f"{arguments[0]} cannot be run: {error.strerror}.", NOT_EXECUTABLE)


def resolve(command: Sequence[str]) -> list[str]:
    """The command with the path of its program; scripts and options of Python get this interpreter.

    A program of this Python's environment comes before one of the same name in ``PATH``.
    """
    name = command[0]
    if name.startswith("-") or name.endswith(".py"):
        return [sys.executable, *command]
    program = shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)
    if program is None:
        _fail(f"There is no command {name}: check its spelling, and that it is installed.", NOT_FOUND)
    return [program, *command[1:]]


def with_registration(environment: Mapping[str, str]) -> dict[str, str]:
    """A copy of the environment whose ``PYTHONPATH`` starts with `STARTUP`, once."""
    before = environment.get("PYTHONPATH")
    kept = [entry for entry in before.split(os.pathsep) if entry != str(STARTUP)] if before else []
    return {**environment, "PYTHONPATH": os.pathsep.join([str(STARTUP), *kept])}


def run(arguments: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run the program as a child, and return its exit code; Ctrl-C reaches it, as part of the same console."""
    previous = signal.signal(signal.SIGINT, lambda number, frame: None)
    try:
        return subprocess.run(arguments, env=environment, check=False).returncode
    finally:
        signal.signal(signal.SIGINT, previous)


def _fail(message: str, code: int) -> NoReturn:
    print(message, file=sys.stderr)
    raise SystemExit(code)
