"""``tekken.json`` files: reading them, and the tokenizer that they describe."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

# The special tokens of a file that lists none (up to version 7), in the order of their ids.
_SPECIAL_TOKENS = (
    *("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]"),
    *("[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]"),
    *("[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]"),
)


def read_tekken(path: Path) -> dict[str, Any]:
    """Read a ``tekken.json``.

    Raises:
        ValueError: The file is not a tekken tokenizer, or is truncated.
    """
    try:
        content: dict[str, Any] = json.loads(path.read_text("utf-8"))
        if {"pattern", "default_vocab_size", "default_num_special_tokens"} <= content["config"].keys() and content[
            "vocab"
        ]:
            return content
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a tekken tokenizer, or is truncated ({error!r}): copy it again.") from error
    raise ValueError(f"{path} is not a tekken tokenizer: it lacks a pattern, sizes or a vocabulary.")


def tekken_tokenizer(content: dict[str, Any], path: Path, version: str | None) -> tuple[Tokenizer, list[str], str]:
    """Build the tokenizer of a file's content.

    Args:
        content: From `read_tekken`.
        path: Names the file in an error.
        version: Overrides the version in the file, such as ``"v3"`` or ``"v3-tekken"``.

    Returns:
        The tokenizer; its special tokens, which are still to be added; and its version as a key of `get_chat_template`.

    Raises:
        ValueError: The special tokens are unknown, or the vocabulary has duplicates.
    """
    config = content["config"]
    special_count = config["default_num_special_tokens"]
    version = (version or f"{config.get('version')}").removesuffix("-tekken")
    if content.get("special_tokens") is None and version not in ("v3", "v7"):
        raise ValueError(f"{path} has version {version} and lists no special tokens: get the model's current file.")
    special = [token["token_str"] for token in content.get("special_tokens") or []] or list(_SPECIAL_TOKENS)
    special += [f"<SPECIAL_{i}>" for i in range(len(special), special_count)]
    tokens = [
        base64.b64decode(t["token_bytes"]) for t in content["vocab"][: config["default_vocab_size"] - special_count]
    ]
    ranks = {token: rank for rank, token in enumerate(tokens)}
    text = _byte_alphabet()
    vocab = {token: i for i, token in enumerate(special)}
    vocab |= {token.decode("latin-1").translate(text): special_count + rank for token, rank in ranks.items()}
    if len(vocab) != special_count + len(tokens):
        raise ValueError(f"{path} has duplicates in its vocabulary: copy it again.")
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
    return tokenizer, special, key


def _byte_alphabet() -> dict[int, str]:
    """The printable character that byte-level BPE writes for each byte: the same one, or one from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def _merges_of_ranks(ranks: dict[bytes, int]) -> Iterator[tuple[bytes, bytes]]:
    """Every pair of tokens that forms a token, the lowest rank first."""
    for whole in ranks:
        cuts = [(whole[:cut], whole[cut:]) for cut in range(1, len(whole))]
        pairs = [(left, right) for left, right in cuts if left in ranks and right in ranks]
        yield from sorted(pairs, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
