"""Random damage to checkpoint folders: bytes, JSON values, headers and whole files."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from tests.helpers.hostile_folders import edit_header, edit_json

Damage = Callable[[Path], object]  # of a folder

# Values that were once accepted, crashed a conversion or took for ever, and their like.
HOSTILE_VALUES: list[Any] = [
    *(None, True, False, 0, 1, 2, -1, 3.7, 4.0, -4.0, 16, 10**6, 10**12, 2**31, 2**63 - 1, 2**63, 10**30),
    *(1e-45, 1e39, 1e300, 1e308, -1e308, float("inf"), float("-inf"), float("nan")),
    *("", "64", "NaN", "²", "yarn", "default", "x" * 5000, "\ud800", "\x1b[2J\n", "\x00", "..", "../x", "/etc/passwd"),
    *([], {}, [1], [0, 0], [None], [[1], [2]], [4.5, 8], {"a": 1}, ["a", "b"], [[[[[]]]]] * 3, [1] * 3000),
]
_values = st.sampled_from(HOSTILE_VALUES) | st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
_positions = st.integers(0, 3000) | st.integers(-3000, -1) | st.integers(0, 100_000)


@st.composite
def damages(draw: st.DrawFn) -> Damage:
    """One change to a folder; which file it meets is drawn too."""
    kind = draw(st.sampled_from(["json", "json", "header", "header", "bytes", "bytes", "file"]))
    choice = draw(st.integers(0, 20))
    if kind == "bytes":
        change_bytes = draw(_byte_changes())
        return Repr(f"bytes of file {choice}: {change_bytes}", lambda folder: _on(folder, choice, "", change_bytes))
    if kind == "file":
        new = draw(st.sampled_from(["missing", "empty", "folder", "pipe", "device", "lost link", "other file"]))
        return Repr(f"file {choice}: {new}", lambda folder: _on(folder, choice, "", lambda path: _replace(path, new)))
    change = draw(_json_changes())
    edit, suffix = (edit_json, ".json") if kind == "json" else (edit_header, ".safetensors")
    return Repr(
        f"{suffix} {choice}: {change}",
        lambda folder: _on(folder, choice, suffix, lambda path: edit(path, change)),
    )


class Repr:
    """A function that a falsified example can show."""

    def __init__(self, text: str, function: Callable[[Any], object]) -> None:
        self.text, self.function = text, function

    def __call__(self, argument: Any) -> object:
        return self.function(argument)

    def __repr__(self) -> str:
        return self.text.encode("ascii", "backslashreplace").decode()


def _on(folder: Path, choice: int, suffix: str, change: Callable[[Path], object]) -> None:
    """Change one of the folder's files with this suffix that an earlier change has left readable."""
    files = sorted(path for path in folder.iterdir() if path.name.endswith(suffix) and path.is_file())
    if files:
        try:
            change(files[choice % len(files)])
        except (ValueError, RecursionError):  # an earlier change made it something that cannot be edited as JSON
            return


@st.composite
def _byte_changes(draw: st.DrawFn) -> Callable[[Path], object]:
    operation = draw(st.sampled_from(["flip", "flip", "truncate", "insert", "overwrite"]))
    position, bit, extra = draw(_positions), draw(st.integers(0, 7)), draw(st.binary(min_size=1, max_size=12))

    def change(path: Path) -> None:
        data = bytearray(path.read_bytes())
        at = position % max(len(data), 1)
        if operation == "flip" and data:
            data[at] ^= 1 << bit
        elif operation == "truncate":
            del data[at:]
        elif operation == "insert":
            data[at:at] = extra
        elif operation == "overwrite":
            data[at : at + len(extra)] = extra
        path.write_bytes(bytes(data))

    return Repr(f"{operation} at {position}, bit {bit}, {extra!r}", change)


@st.composite
def _json_changes(draw: st.DrawFn) -> Callable[[dict[str, Any]], object]:
    """Set, remove or add a field somewhere in an object."""
    steps = draw(st.lists(st.integers(0, 40), min_size=1, max_size=4))
    operation, value = draw(st.sampled_from(["set", "set", "set", "remove", "add", "rename"])), draw(_values)
    key = draw(
        st.sampled_from(["factor", "rank", "layer_types", "moe", "quantization_config", "", "x" * 5000, "\ud800"])
    )

    def change(content: Any) -> None:
        holder: Any = content
        at: Any = key
        for step in steps:  # walk down as far as it goes
            if not isinstance(content, dict | list) or not content:
                break
            holder = content
            at = list(holder)[step % len(holder)] if isinstance(holder, dict) else step % len(holder)
            content = holder[at]
        if not isinstance(holder, dict):
            holder[at] = value
        elif operation == "add":
            holder[key] = value
        elif operation == "set" or at not in holder:
            holder[at] = value
        else:
            removed = holder.pop(at)
            if operation == "rename":
                holder[key] = removed

    return Repr(f"{operation} {steps} {key[:20]!r} {str(value)[:80]!r}", change)


def _replace(path: Path, new: str) -> None:
    others = sorted(other for other in path.parent.iterdir() if other.is_file() and other != path)
    content = others[0].read_bytes() if others else b""
    path.unlink()
    if new == "folder":
        path.mkdir()
    elif new == "pipe":
        os.mkfifo(path)
    elif new == "device":
        path.symlink_to("/dev/zero")
    elif new == "lost link":
        path.symlink_to("nowhere")
    elif new != "missing":
        path.write_bytes(content if new == "other file" else b"")
