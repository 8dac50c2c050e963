"""JSON files of unknown origin: what is refused, and that the message names file and cause."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from mistral_hf.checkpoints.json_file import read_json
from mistral_hf.compatibility import CheckpointError, one_line


@pytest.mark.parametrize("content", ["{}", '{"a": [1, 2.5, true, null, "\\ud800", {"b": -9223372036854775808}]}'])
def test_objects_are_read(content: str, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(content)
    assert read_json(path) == json.loads(content)


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (b"", "Expecting value"),
        (b"{", "Expecting property name"),
        (b"[]", "not a JSON object"),
        (b"3", "not a JSON object"),
        (b'"\xff"', "can't decode"),
        (b'{"a": 1, "a": 2}', "the key 'a' repeats"),
        (b'{"x": {"a": 1, "b": 2, "a": 1}}', "the key 'a' repeats"),
        (b'{"a": NaN}', "the number NaN is not finite"),
        (b'{"a": -Infinity}', "the number -Infinity is not finite"),
        (b'{"a": 1e309}', "the number 1e309 is not finite"),
        (b'{"a": 9223372036854775808}', "9223372036854775808 needs more than 64 bits"),
        (b'{"a": ' + b"9" * 100_000 + b"}", "needs more than 64 bits"),
        (b'{"a": ' + b"[" * 100 + b"]" * 100 + b"}", "nested deeper than 100 levels"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "recursion"),
        (b'{"a": ' * 100_000 + b"1" + b"}" * 100_000, "recursion"),
    ],
    ids=lambda value: str(value[:20]),
)
def test_what_no_checkpoint_needs_is_refused_by_file_and_cause(content: bytes, cause: str, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"x\.json is not JSON \(.*{cause}.*\): copy it again") as caught:
        read_json(path)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("kind", ["pipe", "folder", "device"])
def test_only_regular_files_are_opened(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero")
    with pytest.raises(CheckpointError, match=r"x\.json is not a regular file"):
        read_json(path)


def test_a_huge_file_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.touch()
    os.truncate(path, 1 << 40)
    with pytest.raises(CheckpointError, match="more than 100000000 bytes"):
        read_json(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"lacks x\.json"):
        read_json(tmp_path / "x.json")


def test_messages_are_short_and_printable() -> None:
    message = one_line("bad\n\tname \x1b[2J \ud800 " + "x" * 50_000_000 + ": copy it again.")
    assert message.startswith(r"bad name \x1b[2J \ud800 xxx")
    assert message.endswith("xxx: copy it again.")
    assert len(message) < 1100
    assert message.isprintable()
