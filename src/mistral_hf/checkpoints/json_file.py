"""JSON files of unknown origin, read within limits: the result is an object that is safe to work with, or an error.

Python's parser alone lets through what no checkpoint needs: numbers that are not finite or do not fit into 64 bits,
keys that repeat, and nesting so deep that printing a value fails.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from ..compatibility import CheckpointError

_MAX_BYTES = 100_000_000
_MAX_DEPTH = 100


def read_json(path: Path, what: str = "JSON") -> dict[str, Any]:
    """The object in a JSON file.

    Args:
        path: The file.
        what: What the file should be, for an error.

    Raises:
        CheckpointError: There is no such file, or it breaks a rule of `parse_json`.
    """
    if not path.exists():
        raise CheckpointError(f"{path.parent} lacks {path.name}: give a folder that holds it.")
    check_regular_file(path)
    if path.stat().st_size > _MAX_BYTES:
        raise CheckpointError(f"{path} has more than {_MAX_BYTES} bytes, so it is not {what}: copy it again.")
    return parse_json(path.read_bytes(), str(path), what)


def parse_json(content: bytes, where: str, what: str = "JSON") -> dict[str, Any]:
    """The object in JSON text.

    Args:
        content: The text in UTF-8.
        where: Names the text in an error, as the first words of a sentence.
        what: What the text should be, for an error.

    Raises:
        CheckpointError: The text is not JSON or not an object, a key repeats, a number is not finite or needs more
            than 64 bits, or values are nested deeper than 100 levels.
    """
    try:
        found = json.loads(
            content.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_int=_whole_number,
            parse_float=_finite,
            parse_constant=_finite,
        )
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} is not {what} ({error}): copy it again.") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{where} is not {what} (it is not a JSON object): copy it again.")
    level: list[Any] = [found]
    for _ in range(_MAX_DEPTH):
        level = [child for parent in level for child in _children(parent)]
    if level:
        raise CheckpointError(f"{where} is not {what} (it is nested deeper than {_MAX_DEPTH} levels): copy it again.")
    return found


def check_regular_file(path: Path) -> None:
    """Raise unless a path is a regular file; reading a pipe or a device might never end.

    Raises:
        CheckpointError: It is something else, or does not exist.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is not a regular file: put the file itself in its place.")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r} repeats")
        found[key] = value
    return found


def _whole_number(text: str) -> int:
    if len(text) > 20 or not -(2**63) <= int(text) < 2**63:
        raise ValueError(f"the number {text:.40} needs more than 64 bits")
    return int(text)


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"the number {text:.40} is not finite")
    return number


def _children(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []
