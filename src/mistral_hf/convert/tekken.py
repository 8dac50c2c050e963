"""``tekken.json`` files: reading them, and the tokenizer that they describe."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

# The special tokens of a file that lists none (up to version 7), in the order of their ids.
_SPECIAL_TOKENS = (
    *("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]"),
    *("[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]"),
    *("[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]"),
)


_EFFORTS = {"none", "minimal", "low", "medium", "high", "xhigh", "max"}

# Longer tokens are refused: all cuts of a token are tried. The longest of Mistral's has 128 bytes.
_LONGEST_TOKEN = 1000


class TekkenModel(NamedTuple):
    """The parts of a ``tekken.json`` that the conversion needs.

    Attributes:
        tokens: The ordinary vocabulary, in the order of its ids, which begin after those of the special tokens.
        special: The special tokens; a token's index is its id.
        pattern: The regular expression that splits a text.
        version: Such as ``"v3"``.
        settings: The settings of the model that a conversation may give, as `get_chat_template` takes them.
    """

    tokens: list[bytes]
    special: list[str]
    pattern: Regex
    version: str
    settings: dict[str, Any]


def read_tekken(path: Path, version: str | None = None) -> TekkenModel:
    """Read a ``tekken.json``.

    Args:
        path: The file.
        version: Overrides the version in the file, such as ``"v3"`` or ``"v3-tekken"``.

    Raises:
        ValueError: The file is not a tekken tokenizer or is damaged, or its version's special tokens are unknown.
    """
    content = path.read_bytes()
    try:
        return _parsed(json.loads(content), version and version.removesuffix("-tekken"))
    except Exception as error:  # a wrong type can raise anything; an invalid pattern raises a bare Exception
        reason = f"{error}" if type(error) in (ValueError, Exception) else f"{error!r}"
        raise ValueError(f"{path} is not a tekken tokenizer, or is damaged: {reason[:300]}. Copy it again.") from error


def _parsed(content: dict[str, Any], version: str | None) -> TekkenModel:
    config, vocab, listed = content["config"], content["vocab"], content.get("special_tokens")
    version = version or config.get("version")
    if listed is None and version not in ("v3", "v7"):
        raise ValueError(f"version {version!r} lists no special tokens; get the model's current file")
    special = list(_SPECIAL_TOKENS) if listed is None else [token["token_str"] for token in listed]
    special_count = config["default_num_special_tokens"]
    count = config["default_vocab_size"] - special_count
    # Special tokens that the file does not list are made up: at most as many as its vocabulary has tokens.
    if not (len(special) <= special_count <= len(vocab) and 256 <= count <= len(vocab)):
        raise ValueError(
            f"a default_vocab_size of {count + special_count} with default_num_special_tokens of {special_count} does"
            f" not fit a vocabulary of {len(vocab)} tokens and {len(special)} special tokens"
        )
    if not all(isinstance(token, str) and token for token in special):
        raise ValueError("a token_str of special_tokens is no text, or is empty")
    special += [f"<SPECIAL_{i}>" for i in range(len(special), special_count)]
    tokens = [base64.b64decode(token["token_bytes"], validate=True) for token in vocab[:count]]
    for name, entries in (("vocab", vocab[:count]), ("special_tokens", listed or [])):
        rank = next((i for i, entry in enumerate(entries) if entry.get("rank", i) != i), None)
        if rank is not None:
            raise ValueError(f"the rank of {name}[{rank}] is {entries[rank]['rank']!r}")
    if {bytes([byte]) for byte in range(256)} - set(tokens):
        raise ValueError("the vocabulary lacks some of the 256 bytes")
    if len({*tokens}) + len({*special}) != len(tokens) + len(special):
        raise ValueError("the vocabulary has duplicates")
    if max(map(len, tokens)) > _LONGEST_TOKEN:
        raise ValueError(f"the vocabulary has a token of more than {_LONGEST_TOKEN} bytes")
    settings = _settings(content.get("model_settings_builder") or {})
    return TekkenModel(tokens, special, Regex(config["pattern"]), str(version), settings)


def _settings(builder: dict[str, Any]) -> dict[str, Any]:
    """The settings that version 15 writes before the first message of the user."""
    effort = builder.get("reasoning_effort") or {"values": [], "default": ""}
    efforts, default = effort["values"], effort["default"]
    if not _EFFORTS.issuperset(efforts) or default not in [*efforts, ""]:
        raise ValueError(f"its reasoning_effort has values {efforts!r:.200} and the default {default!r:.200}")
    return {"efforts": list(efforts), "effort": default, "schema": builder.get("json_schema") is not None}


def tekken_tokenizer(model: TekkenModel) -> tuple[Tokenizer, list[str], str]:
    """Build the tokenizer.

    Returns:
        The tokenizer; its special tokens, which are still to be added; and its version as a key of `get_chat_template`.

    Raises:
        ValueError: A special token is also a token of the vocabulary.
    """
    text = _byte_alphabet()
    names = [token.decode("latin-1").translate(text) for token in model.tokens]
    vocab = {token: i for i, token in enumerate([*model.special, *names])}
    if len(vocab) != len(model.special) + len(names):
        raise ValueError("The vocabulary of tekken.json has duplicates: a special token is also an ordinary one.")
    merges = [
        (left.decode("latin-1").translate(text), right.decode("latin-1").translate(text))
        for left, right in _merges_of_ranks({token: rank for rank, token in enumerate(model.tokens)})
    ]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=True))
    split = pre_tokenizers.Split(model.pattern, behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    key = f"{model.version}-tekken" if model.version in ("v3", "v7") else model.version
    return tokenizer, model.special, key


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
