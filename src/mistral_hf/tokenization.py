"""Mistral's tokenizer files (SentencePiece `.model`, `tekken.json`) to `tokenizer.json` and `tokenizer_config.json`.

Needs the `tokenizers` library alone: neither sentencepiece nor mistral-common, here or when the result is loaded.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from .chat import get_chat_template

RAW_TOKENIZER_FILES = (("tekken.json",), ("tokenizer.model", "*.model.v*"))
"""The names of raw tokenizers; a tekken file goes before SentencePiece ones."""

_TEKKEN_SPECIAL_TOKENS = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"]
_TEKKEN_SPECIAL_TOKENS += ["[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]"]
_TEKKEN_SPECIAL_TOKENS += ["[IMG_END]", "[PREFIX]", "[MIDDLE]", "[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"]
_TEKKEN_SPECIAL_TOKENS += ["[TOOL_CONTENT]"]
"""The special tokens of a `tekken.json` that lists none (up to version 7), in the order of their ids."""

_STAND_IN = 0xFDD0
"""The first of the 32 code points that Unicode sets aside for a program's own use (U+FDD0 to U+FDEF)."""


class TokenizerInfo(NamedTuple):
    """What a converted tokenizer says of itself."""

    version: str
    """Such as `"v3"` or `"v3-tekken"`: the key of `get_chat_template`."""
    vocab_size: int
    bos_token_id: int
    eos_token_id: int
    pad_token_id: int


def find_raw_tokenizer(folder: str | Path) -> Path | None:
    """The raw tokenizer file in a folder, or in its `original` subfolder; None if there is none.

    Raises:
        ValueError: If there are several that differ.
    """
    for place in (Path(folder), Path(folder) / "original"):
        for patterns in RAW_TOKENIZER_FILES:
            files = sorted(file for pattern in patterns for file in place.glob(pattern))
            if len({file.read_bytes() for file in files}) > 1:
                names = ", ".join(file.name for file in files)
                raise ValueError(f"{place} holds several tokenizers ({names}): remove those not meant")
            if files:
                return files[-1]
    return None


def convert_tokenizer(
    source: str | Path, folder: str | Path, *, version: str | None = None, max_length: int | None = None
) -> TokenizerInfo:
    """Write `tokenizer.json` and `tokenizer_config.json`, chat template included, for a raw tokenizer file.

    Args:
        source: A `tekken.json` or a SentencePiece `.model` file.
        folder: An existing folder.
        version: Such as `"v3"`, if the file is not what its own content says.
        max_length: The model's longest input, for `model_max_length`.

    Raises:
        ValueError: If the file is damaged, of an unknown version, or no BPE model.
    """
    source = Path(source)
    if source.suffix == ".json":
        tokenizer, version = _from_tekken(_read_tekken(source), source, version)
    else:
        model = read_sentencepiece(source)
        tokenizer, version = _from_sentencepiece(model), version or _sentencepiece_version(source, model)
    pad = "<pad>" if tokenizer.token_to_id("<pad>") is not None else "<unk>"
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": pad,
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "mistral_version": version,
        "chat_template": get_chat_template(version),
    }
    if max_length is not None:
        config["model_max_length"] = max_length
    tokenizer.save(str(Path(folder) / "tokenizer.json"))
    (Path(folder) / "tokenizer_config.json").write_text(
        json.dumps(config, indent=2, ensure_ascii=False) + "\n", "utf-8"
    )
    ids = [_id_of(tokenizer, token) for token in ("<s>", "</s>", pad)]
    return TokenizerInfo(version, tokenizer.get_vocab_size(), *ids)


def _id_of(tokenizer: Tokenizer, token: str) -> int:
    token_id = tokenizer.token_to_id(token)
    if token_id is None:
        raise ValueError(f"the vocabulary lacks {token}")
    return int(token_id)


def raw_encoder(source: str | Path) -> Callable[[str], list[int]]:
    """A function that encodes text as a raw tokenizer file says, control tokens being mere text.

    It is mistral-common's own if that is installed, and the conversion's otherwise.
    """
    source = Path(source)
    try:
        from mistral_common.tokens.tokenizers.sentencepiece import SentencePieceTokenizer
        from mistral_common.tokens.tokenizers.tekken import Tekkenizer

        reference: Any = Tekkenizer.from_file(source) if source.suffix == ".json" else SentencePieceTokenizer(source)
        return lambda text: list(reference.encode(text, bos=False, eos=False))
    except ImportError:
        if source.suffix == ".json":
            tokenizer, _ = _from_tekken(_read_tekken(source), source, None)
        else:
            tokenizer = _from_sentencepiece(read_sentencepiece(source))
        tokenizer.encode_special_tokens = True
        return lambda text: tokenizer.encode(text, add_special_tokens=False).ids


# SentencePiece


class Piece(NamedTuple):
    """One entry of a SentencePiece vocabulary."""

    text: str
    score: float
    kind: int


_NORMAL, _CONTROL, _USER_DEFINED, _BYTE = 1, 3, 4, 6


class SentencePieceModel(NamedTuple):
    """What the conversion needs of a SentencePiece model file."""

    pieces: list[Piece]
    trainer: dict[int, Any]
    normalizer: dict[int, Any]


def read_sentencepiece(path: str | Path) -> SentencePieceModel:
    """Read a `.model` file (a protocol buffer) of a BPE model with byte fallback and a dummy prefix.

    Raises:
        ValueError: If the file is none, or is truncated.
    """
    try:
        fields = list(_fields(memoryview(Path(path).read_bytes())))
        pieces = [_piece(value) for number, value in fields if number == 1]
        trainer, normalizer = (dict(_fields(dict(fields)[number])) for number in (2, 3))
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise ValueError(f"{path} is no SentencePiece model, or is truncated ({error!r}): copy it again") from error
    is_bpe, byte_fallback = trainer.get(3, 1) == 2, trainer.get(35, 0) == 1
    keeps_text = not normalizer.get(2, b"") and normalizer.get(3, 1) and not normalizer.get(4, 1)
    if not (is_bpe and byte_fallback and keeps_text):
        raise ValueError(f"{path} is no Mistral tokenizer: it is not BPE with byte fallback and untouched text")
    return SentencePieceModel(pieces, trainer, normalizer)


def _piece(encoded: memoryview) -> Piece:
    fields = dict(_fields(encoded))
    return Piece(bytes(fields[1]).decode(), fields.get(2, 0.0), fields.get(3, _NORMAL))


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
            raise ValueError(f"bad field at byte {position}")
        part = data[position : position + size]
        yield key >> 3, part.cast("f")[0] if kind == 5 else part
        position += size


def _varint(data: memoryview, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[position]
        value |= (byte & 0x7F) << shift
        position, shift = position + 1, shift + 7
        if byte < 0x80:
            return value, position


def _sentencepiece_version(path: Path, model: SentencePieceModel) -> str:
    """The version in the file's name, or else the one whose control tokens the vocabulary has."""
    named = re.search(r"\.v(\d+)(m\d+)?$", path.name)
    if named:
        return f"v{named[1]}"
    controls = {piece.text for piece in model.pieces if piece.kind == _CONTROL}
    marks = (("[SYSTEM_PROMPT]", "v7"), ("[PREFIX]", "v3"), ("[INST]", "v2"))
    return next((version for mark, version in marks if mark in controls), "v1")


def _from_sentencepiece(model: SentencePieceModel) -> Tokenizer:
    """Build the tokenizer.

    Each stretch of text between special tokens gets SentencePiece's dummy prefix, as if encoded on its own: that is
    how Mistral encodes the parts of a conversation. A user-defined piece such as `[REF]` is one token wherever it
    stands and takes no part in merges, so a stand-in character takes its place in the vocabulary.
    """
    defined = {p.text: chr(_STAND_IN + i) for i, p in enumerate(p for p in model.pieces if p.kind == _USER_DEFINED)}
    vocab = {defined.get(piece.text, piece.text): i for i, piece in enumerate(model.pieces)}
    if len(vocab) != len(model.pieces) or len(defined) > 32:
        raise ValueError("the SentencePiece vocabulary has duplicates, or too many user-defined pieces")
    scores = {piece.text: piece.score for piece in model.pieces if piece.kind == _NORMAL}
    tokenizer = Tokenizer(
        models.BPE(vocab=vocab, merges=_merges_of_scores(scores), unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        + [normalizers.Replace(text, stand_in) for text, stand_in in defined.items()]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        + [decoders.Replace(stand_in, text) for text, stand_in in defined.items()]
    )
    return _with_special_tokens(tokenizer, ["<unk>"] + [p.text for p in model.pieces if p.kind == _CONTROL])


def _merges_of_scores(scores: dict[str, float]) -> list[tuple[str, str]]:
    """Every pair of pieces that makes up a piece, the highest score first."""
    merges = [
        (-score, whole, whole[:cut], whole[cut:])
        for whole, score in scores.items()
        for cut in range(1, len(whole))
        if whole[:cut] in scores and whole[cut:] in scores
    ]
    return [(left, right) for _, _, left, right in sorted(merges, key=lambda merge: merge[0])]


# tekken


def _read_tekken(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text("utf-8"))
        if {"pattern", "default_vocab_size", "default_num_special_tokens"} <= content["config"].keys() and content[
            "vocab"
        ]:
            return content
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no tekken tokenizer, or is truncated ({error!r}): copy it again") from error
    raise ValueError(f"{path} is no tekken tokenizer: it lacks a pattern, sizes or a vocabulary")


def _from_tekken(content: dict[str, Any], path: Path, version: str | None) -> tuple[Tokenizer, str]:
    config = content["config"]
    special_count = config["default_num_special_tokens"]
    version = version or f"{config.get('version')}"
    if content.get("special_tokens") is None and version not in ("v3", "v7"):
        raise ValueError(f"{path} is of version {version} and lists no special tokens: get the model's current file")
    special = [token["token_str"] for token in content.get("special_tokens") or []] or list(_TEKKEN_SPECIAL_TOKENS)
    special += [f"<SPECIAL_{i}>" for i in range(len(special), special_count)]
    tokens = [
        base64.b64decode(t["token_bytes"]) for t in content["vocab"][: config["default_vocab_size"] - special_count]
    ]
    ranks = {token: rank for rank, token in enumerate(tokens)}
    text = _byte_alphabet()
    vocab = {token: i for i, token in enumerate(special)}
    vocab |= {token.decode("latin-1").translate(text): special_count + rank for token, rank in ranks.items()}
    if len(vocab) != special_count + len(tokens):
        raise ValueError(f"{path} has duplicates in its vocabulary")
    merges = [
        (left.decode("latin-1").translate(text), right.decode("latin-1").translate(text))
        for left, right in _merges_of_ranks(ranks)
    ]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=True))
    split = pre_tokenizers.Split(Regex(config["pattern"]), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    key = f"{version}-tekken" if version in ("v3", "v7") else version
    return _with_special_tokens(tokenizer, special), key


def _byte_alphabet() -> dict[int, str]:
    """The printable character that byte-level BPE writes for each byte: its own, or one from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def _merges_of_ranks(ranks: dict[bytes, int]) -> Iterator[tuple[bytes, bytes]]:
    """Every pair of tokens that makes up a token, the lowest rank first."""
    for whole in ranks:
        cuts = [(whole[:cut], whole[cut:]) for cut in range(1, len(whole))]
        pairs = [(left, right) for left, right in cuts if left in ranks and right in ranks]
        yield from sorted(pairs, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))


def _with_special_tokens(tokenizer: Tokenizer, special: Iterable[str]) -> Tokenizer:
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    begin = ("<s>", _id_of(tokenizer, "<s>"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B:1", special_tokens=[begin]
    )
    return tokenizer
