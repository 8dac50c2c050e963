"""Conversations for property tests, and the ids of mistral-common."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from mistral_common.exceptions import MistralCommonException
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.protocol.instruct.validator import ValidationMode
from pydantic import ValidationError

from tests.helpers.tokenizer_files import reference

# sentencepiece raises a RuntimeError for surrogates, and json.loads one for deep nesting.
REFUSALS = (MistralCommonException, ValidationError, ValueError, AssertionError, RuntimeError)
ORDINARY = st.characters(exclude_categories=["Cs"])
TOKENS = ["[INST]", "[/INST]", "</s>", "<s>", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "<pad>", "[ARGS]"]
TOKENS += ["[/THINK]", "[SYSTEM_PROMPT]", "[REF]", "CONTINUE_FINAL_MESSAGE_TAG ", "CONTINUE_FINAL_MESSAGE_TAG"]
# For private use, reserved for internal use, invisible, and what SentencePiece writes for a space.
RARE = ["\ue000", "\uf8ff", "\ufdd0", "\ufdef", "\uffff", "\U000f0000", "\u200b", "\0", "\u2581"]
SAMPLES = ["Hello there", "  two\n\nlines  ", "trailing   ", "été 東京 👩", " "]
PLAIN = (st.text(ORDINARY, max_size=12) | st.sampled_from(SAMPLES)).filter(lambda text: not set("<[") & set(text))


def escaped(text: str, rng: random.Random, rate: float) -> str:
    """A text as the inside of a JSON string, with some of its characters written as escapes without need."""
    written = ""
    for character in text:
        units = character.encode("utf-16-be", "surrogatepass").hex()
        if rng.random() < rate:
            unicode = "".join(f"\\u{units[i : i + 4]}" for i in range(0, len(units), 4))
            written += rng.choice([unicode, "\\/"]) if character == "/" else unicode
        else:
            written += json.dumps(character, ensure_ascii=False)[1:-1]
    return written


@st.composite
def hidden_tokens(draw: st.DrawFn) -> str:
    """A control token as it is, in JSON's escapes, cut in two by a rare character or by another token, or repeated."""
    token = draw(st.sampled_from(TOKENS))
    disguise = draw(st.integers(0, 5))
    if disguise == 0:
        return escaped(token, random.Random(draw(st.integers(0, 99))), 0.3)
    if disguise == 1:
        cut = draw(st.integers(1, len(token) - 1))
        return token[:cut] + draw(st.sampled_from([*RARE, *TOKENS])) + token[cut:]
    return token * (2 if disguise == 2 else 1)


PIECES = hidden_tokens() | hidden_tokens() | PLAIN | st.sampled_from(["[IN", "/s>", "<\\/s>", *RARE])
HOSTILE = st.lists(PIECES, max_size=4).map("".join)
# Half surrogate pairs, alone and in order: tekken replaces or joins them, SentencePiece refuses them.
BROKEN = st.lists(PIECES | st.sampled_from(["\ud800", "\udfff", "\ud83d\ude00"]), max_size=4).map("".join)
NAMES = st.sampled_from(["get_weather", "search-web", "f", "x" * 64])
IDS = st.sampled_from(["abcdefghi", "ABCDEFGH1", "123456789"])


def json_values(text: st.SearchStrategy[str]) -> st.SearchStrategy[Any]:
    """Any JSON value whose strings are drawn from `text`."""
    numbers = st.integers() | st.floats() | st.sampled_from([0, -0.0, 1e22, 1e-7, 10**30])
    leaves = st.none() | st.booleans() | numbers | text
    return st.recursive(leaves, lambda inner: st.lists(inner, max_size=3) | objects(text, inner), max_leaves=6)


def objects(text: st.SearchStrategy[str], inner: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """JSON objects with the given keys and values."""
    return st.dictionaries(text, inner, max_size=3)


BROKEN_JSON = ["{", "[1,]", '{"a" 1}', "01", "+1", "1.", ".5", "tru", "'a'", "[1 2]", "{1: 2}", '"a', "1e", "--1"]
BROKEN_JSON += ['{"a":}', "[],", "1e+", "1.2.3", '"\\x"', '"\\u12g4"', '"\t"', "[}", "٣", "1_0", "0x1", "{,}", "[,1]"]
BROKEN_JSON += [""]


def spelled_json(value: Any, rng: random.Random) -> str:
    """JSON text of a value with spaces and escapes where they may be."""
    space = rng.choice(["", "", " ", "\n\t"])
    if isinstance(value, str):
        return f'{space}"{escaped(value, rng, rng.choice([0, 0, 0.2, 1]))}"{space}'
    if isinstance(value, dict):
        items = [f"{spelled_json(key, rng)}:{spelled_json(item, rng)}" for key, item in value.items()]
        return f"{space}{{{','.join(items)}}}{space}"
    if isinstance(value, list):
        return f"{space}[{','.join(spelled_json(item, rng) for item in value)}]{space}"
    return f"{space}{json.dumps(value)}{space}"


@st.composite
def json_texts(draw: st.DrawFn, text: st.SearchStrategy[str]) -> str:
    """JSON in any spelling, and text that only looks like it."""
    value = draw(json_values(text))
    spelled = draw(
        st.just(json.dumps(value, indent=2))
        | st.integers(0, 999).map(lambda seed: spelled_json(value, random.Random(seed)))
    )
    unlike = st.sampled_from([spelled + "x", spelled[:-1], "", " ", *BROKEN_JSON])
    return draw(st.just(spelled) | st.just(spelled) | unlike | text)


def written_json_texts(text: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    """JSON in the one spelling that the templates write, and text that does not look like it."""
    unlike = st.sampled_from(
        ["", " ", "sunny", "22 degrees", "01", "+1", "1.", "tru", "'a'", '"', "1_0", "0x1", "--1", "nan", "-inf"]
    )
    written = json_values(text).map(lambda value: json.dumps(value, ensure_ascii=False))
    return written | unlike | text.filter(lambda drawn: drawn[:1] not in ("{", '"'))


@st.composite
def tool_calls(
    draw: st.DrawFn, text: st.SearchStrategy[str], json_text: st.SearchStrategy[str], ids: st.SearchStrategy[str]
) -> list[dict[str, Any]]:
    """One or two calls, whose arguments are an object or JSON text."""
    count = draw(st.integers(1, 2))
    arguments = objects(text, json_values(text)) | json_text
    chosen = draw(st.lists(ids, min_size=count, max_size=count, unique=draw(st.booleans())))
    return [{"id": i, "function": {"name": draw(NAMES), "arguments": draw(arguments)}} for i in chosen]


@st.composite
def tool_definitions(draw: st.DrawFn, text: st.SearchStrategy[str]) -> list[dict[str, Any]] | None:
    """No tools, or one or two."""
    if draw(st.booleans()):
        return None
    properties = {draw(text): {"description": draw(text), "default": draw(json_values(text))}}
    function = {
        "name": draw(NAMES),
        "description": draw(text),
        "parameters": {"type": "object", "properties": properties},
    }
    bare = {"name": "bare", "parameters": {}}
    return [{"type": "function", "function": f} for f in draw(st.sampled_from([[function], [function, bare], [bare]]))]


@st.composite
def conversations(
    draw: st.DrawFn, text: st.SearchStrategy[str], json_text: st.SearchStrategy[str], thoughts: bool
) -> list[dict[str, Any]]:
    """Messages that are mostly in an order that the formats allow, and sometimes in any order."""
    orderly = draw(st.integers(0, 3)) > 0
    ids = IDS if draw(st.integers(0, 4)) else st.sampled_from(["short", "abcdefghi", "null", "abcdefgh-", ""])
    messages: list[dict[str, Any]] = [{"role": "system", "content": draw(text)}] if draw(st.booleans()) else []
    pending: list[str] = []
    for _ in range(draw(st.integers(1, 5))):
        roles = ["user", "assistant", "system", "tool"]
        if orderly:
            previous = messages[-1]["role"] if messages else "system"
            roles = ["tool"] if pending else {"user": ["assistant"], "assistant": ["user"]}.get(previous, ["user"])
            roles = ["assistant", "user"] if previous == "tool" and not pending else roles
        role = draw(st.sampled_from(roles))
        message: dict[str, Any] = {"role": role, "content": draw(text)}
        if role == "tool":
            message["content"] = draw(json_text)
            message["tool_call_id"] = pending.pop(draw(st.integers(0, len(pending) - 1))) if pending else draw(ids)
            if draw(st.booleans()):
                message["name"] = draw(NAMES)
        elif role == "assistant" and draw(st.booleans()):
            message["tool_calls"] = draw(tool_calls(text, json_text, ids))
            pending = [call["id"] for call in message["tool_calls"]] if orderly else []
            if draw(st.integers(0, 3)):
                message["content"] = None
        if message["content"] and draw(st.integers(0, 5)) == 0:
            parts = [{"type": "text", "text": message["content"]}, {"type": "text", "text": draw(text)}]
            if role == "assistant" and thoughts:
                thought = {"type": "thinking", "thinking": draw(text)}
                parts = draw(st.sampled_from([[thought, *parts], [{**thought, "closed": False}]]))
            message["content"] = parts
        messages.append(message)
    return messages


def expected_ids(
    version: str, folder: Path, mode: ValidationMode, messages: list[dict[str, Any]], tools: Any, **options: Any
) -> list[int] | None:
    """The ids of mistral-common, or None where it refuses the conversation."""
    try:
        request = ChatCompletionRequest.from_openai([dict(m) for m in messages], tools=tools, **options)
        return reference(version, folder, mode).encode_chat_completion(request).tokens
    except REFUSALS:
        return None


quick = settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
