"""SentencePiece ``.model`` files: reading the protocol buffer, and the tokenizer that it describes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Tokenizer, decoders, models, normalizers


class Piece(NamedTuple):
    """One entry of a SentencePiece vocabulary.

    Attributes:
        text: The piece, with U+2581 for a space.
        score: The higher, the earlier two parts are merged into it.
        kind: A number of the format: 1 for an ordinary piece, 3 control, 4 user-defined, 6 byte.
    """

    text: str
    score: float
    kind: int


_NORMAL, _CONTROL, _USER_DEFINED, _BYTE = 1, 3, 4, 6
_SPACE_BYTE = "<0x20>"
# Longer pieces are refused: all cuts of a piece are tried. The longest of Mistral's has 18 characters.
_LONGEST_PIECE = 1000


class SentencePieceModel(NamedTuple):
    """The parts of a SentencePiece model file that the conversion needs.

    Attributes:
        pieces: The vocabulary; a piece's index is its id.
        trainer: The trainer's settings, by field number.
        normalizer: The normalizer's settings, by field number.
    """

    pieces: list[Piece]
    trainer: dict[int, Any]
    normalizer: dict[int, Any]


def read_sentencepiece(path: str | Path) -> SentencePieceModel:
    """Read a ``.model`` file (a protocol buffer) of a BPE model with byte fallback and a dummy prefix.

    Raises:
        ValueError: The file is not such a model, or is truncated.
    """
    try:
        fields = list(_fields(memoryview(Path(path).read_bytes())))
        pieces = [_piece(value) for number, value in fields if number == 1]
        trainer, normalizer = (dict(_fields(dict(fields)[number])) for number in (2, 3))
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise ValueError(
            f"{path} is not a SentencePiece model, or is truncated ({error!r:.300}): copy it again."
        ) from error
    is_bpe, byte_fallback = trainer.get(3, 1) == 2, trainer.get(35, 0) == 1
    keeps_text = not normalizer.get(2, b"") and normalizer.get(3, 1) and not normalizer.get(4, 1)
    if not (is_bpe and byte_fallback and keeps_text):
        raise ValueError(f"{path} is not a Mistral tokenizer: it is not BPE with byte fallback and unchanged text.")
    if {f"<0x{byte:02X}>" for byte in range(256)} - {piece.text for piece in pieces if piece.kind == _BYTE}:
        raise ValueError(f"{path} is not a Mistral tokenizer: its vocabulary lacks some of the 256 bytes.")
    if max(len(piece.text) for piece in pieces) > _LONGEST_PIECE:
        raise ValueError(f"{path} is not a Mistral tokenizer: it has a piece of more than {_LONGEST_PIECE} characters.")
    return SentencePieceModel(pieces, trainer, normalizer)


def _piece(encoded: memoryview) -> Piece:
    fields = dict(_fields(encoded))
    text, score, kind = fields[1], fields.get(2, 0.0), fields.get(3, _NORMAL)
    if not (isinstance(text, memoryview) and isinstance(score, float) and isfinite(score) and isinstance(kind, int)):
        raise ValueError("a piece has fields of wrong types")
    return Piece(bytes(text).decode(), score, kind)


def _fields(data: memoryview) -> Iterator[tuple[int, Any]]:
    """The (number, value) pairs of a protocol buffer message: varints, 32-bit floats, and bytes."""
    position = 0
    while position < len(data):
        key, position = _varint(data, position)
        kind = key & 7
        if kind == 0:
            value, position = _varint(data, position)
            yield key >> 3, value
            continue
        size, position = (4, position) if kind == 5 else _varint(data, position)
        if kind not in (2, 5) or position + size > len(data):
            raise ValueError(f"unexpected field at byte {position}")
        part = data[position : position + size]
        yield key >> 3, part.cast("f")[0] if kind == 5 else part
        position += size


def _varint(data: memoryview, position: int) -> tuple[int, int]:
    """The number that begins at a position, seven bits a byte, and the position after it."""
    value = shift = 0
    while shift < 70:
        byte = data[position]
        value |= (byte & 0x7F) << shift
        position, shift = position + 1, shift + 7
        if byte < 0x80:
            return value, position
    raise ValueError(f"a number of more than 10 bytes before byte {position}")


def sentencepiece_version(path: Path, model: SentencePieceModel) -> str:
    """The version in the file's name; without one, the version whose control tokens are in the vocabulary."""
    named = re.search(r"\.v(\d+)(m\d+)?$", path.name)
    if named:
        return f"v{named[1]}"
    controls = {piece.text for piece in model.pieces if piece.kind == _CONTROL}
    marks = (("[SYSTEM_PROMPT]", "v7"), ("[PREFIX]", "v3"), ("[INST]", "v2"))
    return next((version for mark, version in marks if mark in controls), "v1")


def sentencepiece_tokenizer(model: SentencePieceModel) -> tuple[Tokenizer, list[str]]:
    """Build the tokenizer, and list its special tokens, which are still to be added.

    Each stretch of text between special tokens gets SentencePiece's dummy prefix, as if it were encoded alone: that is
    how Mistral encodes the parts of a conversation. A user-defined piece such as ``[REF]`` is always one token and no
    part of a merge, so a stand-in replaces it in the vocabulary: a space and a letter, which are merged before all
    others. Text cannot contain it, since all its spaces are written as U+2581; hence the byte of a space is never
    needed, and the space takes its place in the vocabulary.

    Raises:
        ValueError: The vocabulary has duplicates, or too many user-defined pieces.
    """
    letters = (piece.text for piece in model.pieces if piece.kind == _NORMAL and len(piece.text) == 1)
    defined = [piece.text for piece in model.pieces if piece.kind == _USER_DEFINED]
    stand_ins = {text: f" {letter}" for text, letter in zip(defined, letters, strict=False)}
    renamed = stand_ins | {_SPACE_BYTE: " "}
    names = [piece.text if piece.kind == _NORMAL else renamed.get(piece.text, piece.text) for piece in model.pieces]
    vocab = {name: i for i, name in enumerate(names)}
    if len(vocab) != len(names) or len(stand_ins) != len(defined):
        raise ValueError("The SentencePiece vocabulary has duplicates, or more user-defined pieces than letters.")
    scores = {piece.text: piece.score for piece in model.pieces if piece.kind == _NORMAL}
    merges = [(" ", stand_in[1]) for stand_in in stand_ins.values()] + _merges_of_scores(scores)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        + [normalizers.Replace(text, stand_in) for text, stand_in in stand_ins.items()]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(stand_in, text) for text, stand_in in stand_ins.items()]
        + [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer, ["<unk>"] + [p.text for p in model.pieces if p.kind == _CONTROL]


def _merges_of_scores(scores: dict[str, float]) -> list[tuple[str, str]]:
    """Every pair of pieces that forms a piece, the highest score first."""
    merges = [
        (-score, whole, whole[:cut], whole[cut:])
        for whole, score in scores.items()
        for cut in range(1, len(whole))
        if whole[:cut] in scores and whole[cut:] in scores
    ]
    return [(left, right) for _, _, left, right in sorted(merges, key=lambda merge: merge[0])]
