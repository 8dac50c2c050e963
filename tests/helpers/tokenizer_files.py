"""The tokenizer files in mistral-common, small tekken files of the later versions, and converted ones."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path

import mistral_common
from mistral_common.protocol.instruct.validator import ValidationMode
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from mistral_hf.convert.tokenizer import convert_tokenizer

DATA = Path(mistral_common.__file__).parent / "data"
REAL = {
    "v1": DATA / "tokenizer.model.v1",
    "v2": DATA / "mistral_instruct_tokenizer_240216.model.v2",
    "v3": DATA / "mistral_instruct_tokenizer_240323.model.v3",
    "v7": DATA / "mistral_instruct_tokenizer_241114.model.v7",
    "v3-tekken": DATA / "tekken_240718.json",
}
SPECIAL_TOKENS = (
    "<unk> <s> </s> [INST] [/INST] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_RESULTS] [/TOOL_RESULTS] [TOOL_CALLS] "
    "[IMG] <pad> [IMG_BREAK] [IMG_END] [PREFIX] [MIDDLE] [SUFFIX] [SYSTEM_PROMPT] [/SYSTEM_PROMPT] [TOOL_CONTENT] "
    "[AUDIO] [BEGIN_AUDIO] [ARGS] [CALL_ID] [THINK] [/THINK] [MODEL_SETTINGS] [/MODEL_SETTINGS]"
)
VERSIONS = [*REAL, "v7-tekken", "v11", "v13", "v15"]
THINKING = ("v13", "v15")  # versions with thoughts
SETTINGS = {
    "reasoning_effort": {"type": "enum", "accepts_none": True, "default": "none", "values": ["none", "high"]},
    "json_schema": {"type": "json_schema", "accepts_none": False, "default": None},
}


@lru_cache
def raw_file(version: str, folder: Path) -> Path:
    """A raw tokenizer of this version; where there is no real file, one of tekken's first tokens."""
    if version in REAL:
        return REAL[version]
    content = json.loads(REAL["v3-tekken"].read_text())
    names = SPECIAL_TOKENS.split()
    special = [{"rank": i, "token_str": name, "is_control": True} for i, name in enumerate(names)]
    content["vocab"] = content["vocab"][:4000]
    content["config"] |= {
        "version": version.removesuffix("-tekken"),
        "default_num_special_tokens": 40,
        "default_vocab_size": 4040,
        "num_vocab_tokens": 4000,
    }
    if version == "v15":
        content["model_settings_builder"] = SETTINGS
    path = folder / version / "tekken.json"
    path.parent.mkdir()
    path.write_text(json.dumps(content | {"special_tokens": special}))
    return path


@lru_cache
def reference(version: str, folder: Path, mode: ValidationMode = ValidationMode.agnostic) -> MistralTokenizer:
    """The tokenizer of mistral-common."""
    return MistralTokenizer.from_file(raw_file(version, folder), mode=mode)


@lru_cache
def converted(version: str, folder: Path) -> PreTrainedTokenizerBase:
    """The converted tokenizer, loaded by ``AutoTokenizer``."""
    target = folder / f"{version}-converted"
    target.mkdir()
    convert_tokenizer(raw_file(version, folder), target)
    return AutoTokenizer.from_pretrained(target)
