"""Mistral's tokenizer files (SentencePiece, ``tekken.json``) to ``tokenizer.json`` and ``tokenizer_config.json``.

Neither the conversion nor loading its result needs sentencepiece or mistral-common, only the ``tokenizers`` library.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import AddedToken, Tokenizer, processors

from ..chat.template import get_chat_template
from .sentencepiece import read_sentencepiece, sentencepiece_tokenizer, sentencepiece_version
from .tekken import read_tekken, tekken_tokenizer

# The names of raw tokenizers; a tekken file comes before SentencePiece ones.
RAW_TOKENIZER_FILES = (("tekken.json",), ("tokenizer.model", "*.model.v*"))


class TokenizerInfo(NamedTuple):
    """Version, size and special tokens of a converted tokenizer.

    Attributes:
        version: The key of `get_chat_template`, such as ``"v3"`` or ``"v3-tekken"``.
        vocab_size: Number of tokens.
        bos_token_id: Id of ``<s>``.
        eos_token_id: Id of ``</s>``.
        pad_token_id: Id of ``<pad>``, or of ``<unk>`` where there is no ``<pad>``.
    """

    version: str
    vocab_size: int
    bos_token_id: int
    eos_token_id: int
    pad_token_id: int


def find_raw_tokenizer(folder: str | Path) -> Path | None:
    """The raw tokenizer file in a folder, or in its ``original`` subfolder; None if there is none.

    Raises:
        ValueError: There are several that differ.
    """
    for parent in (Path(folder), Path(folder) / "original"):
        for patterns in RAW_TOKENIZER_FILES:
            files = sorted(file for pattern in patterns for file in parent.glob(pattern) if file.is_file())
            if len({file.read_bytes() for file in files}) > 1:
                names = ", ".join(file.name for file in files)
                raise ValueError(f"{parent} holds several tokenizers ({names}): remove all but one.")
            if files:
                return files[-1]
    return None


def convert_tokenizer(
    source: str | Path, folder: str | Path, *, version: str | None = None, max_length: int | None = None
) -> TokenizerInfo:
    """Write ``tokenizer.json`` and ``tokenizer_config.json``, chat template included, for a raw tokenizer file.

    Args:
        source: A ``tekken.json`` or a SentencePiece ``.model`` file.
        folder: An existing folder.
        version: Overrides the version found in the file, such as ``"v3"`` or ``"v3-tekken"``.
        max_length: The model's longest input in tokens, for ``model_max_length``.

    Returns:
        The version, size and special tokens.

    Raises:
        ValueError: The file is damaged, of an unknown version, or not a BPE model.
    """
    source = Path(source)
    settings = None
    if source.suffix == ".json":
        tekken = read_tekken(source, version)
        tokenizer, special, version = tekken_tokenizer(tekken)
        settings = tekken.settings
    else:
        if version is not None and version.endswith("-tekken"):
            raise ValueError(
                f"{source} is a SentencePiece file, so its version cannot be {version!r}: give"
                f" {version.removesuffix('-tekken')!r}."
            )
        model = read_sentencepiece(source)
        tokenizer, special = sentencepiece_tokenizer(model)
        version = version or sentencepiece_version(source, model)
    _add_special_tokens(tokenizer, special)
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
        "chat_template": get_chat_template(version, settings),
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
        raise ValueError(f"The vocabulary lacks {token}: this is not a Mistral tokenizer.")
    return int(token_id)


def raw_encoder(source: str | Path) -> Callable[[str], list[int]]:
    """A function that encodes text with a raw tokenizer file; control tokens in the text stay text.

    It uses mistral-common if that is installed, and the conversion otherwise.
    """
    source = Path(source)
    try:
        from mistral_common.tokens.tokenizers.sentencepiece import SentencePieceTokenizer
        from mistral_common.tokens.tokenizers.tekken import Tekkenizer

        reference: Any = Tekkenizer.from_file(source) if source.suffix == ".json" else SentencePieceTokenizer(source)
        return lambda text: list(reference.encode(text, bos=False, eos=False))
    except ImportError:
        if source.suffix == ".json":
            tokenizer, special, _ = tekken_tokenizer(read_tekken(source))
        else:
            tokenizer, special = sentencepiece_tokenizer(read_sentencepiece(source))
        _add_special_tokens(tokenizer, special)
        tokenizer.encode_special_tokens = True
        return lambda text: tokenizer.encode(text, add_special_tokens=False).ids


def _add_special_tokens(tokenizer: Tokenizer, special: Iterable[str]) -> None:
    """Add the special tokens, and begin every text with ``<s>``."""
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    begin = ("<s>", _id_of(tokenizer, "<s>"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B:1", special_tokens=[begin]
    )
