"""Fresh interpreters that cannot find some packages."""

import os
import subprocess
import sys

_HIDE = """
import importlib.machinery, sys
find = importlib.machinery.PathFinder.find_spec
hidden = lambda name, *args, **kwargs: None if name.partition(".")[0] in {hidden!r} else find(name, *args, **kwargs)
importlib.machinery.PathFinder.find_spec = staticmethod(hidden)
"""


def run_python(code: str, hidden: tuple[str, ...] = (), **environment: str) -> str:
    """The standard output of `code` in a fresh interpreter that cannot find the packages `hidden`."""
    done = subprocess.run(
        [sys.executable, "-c", _HIDE.format(hidden=hidden) + code],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", **environment},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
