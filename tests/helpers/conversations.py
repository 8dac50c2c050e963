"""Conversations for property tests, and the ids of mistral-common."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from mistral_common.exceptions import MistralCommonException
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.protocol.instruct.validator import ValidationMode
from pydantic import ValidationError

from tests.helpers.tokenizer_files import reference

REFUSALS = (MistralCommonException, ValidationError, ValueError, AssertionError, RuntimeError)  # SentencePiece's is the last
# U+FDD0 to U+FDEF stand in for SentencePiece's user-defined pieces; surrogates are not text.
ORDINARY = st.characters(exclude_categories=["Cs"], exclude_characters=[chr(c) for c in range(0xFDD0, 0xFDF0)])
LOOK_ALIKES = ["[INST]", "[/INST]", "</s>", "<s>", "[TOOL_CALLS]", "[TOOL_RESULTS]", "<pad>", "[ARGS]", "[/THINK]"]
SAMPLES = ["Hello there", "  two\n\nlines  ", "trailing   ", "été 東京 👩", " "]
PLAIN = (st.text(ORDINARY, max_size=12) | st.sampled_from(SAMPLES)).filter(lambda text: not set("<[") & set(text))
HOSTILE = st.lists(PLAIN | st.sampled_from([*LOOK_ALIKES, "[IN"]), max_size=4).map("".join)
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


@st.composite
def json_texts(draw: st.DrawFn, text: st.SearchStrategy[str]) -> str:
    """JSON in any spelling, and text that only looks like it."""
    value = draw(json_values(text))
    spelled = json.dumps(
        value,
        ensure_ascii=draw(st.booleans()),
        indent=draw(st.sampled_from([None, 2])),
        separators=draw(st.sampled_from([None, (",", ":"), (" ,\t", "\n: ")])),
    )
    return draw(st.sampled_from([spelled, spelled, spelled, spelled + "x", spelled[:-1], "", " ", *BROKEN_JSON]))


@st.composite
def tool_calls(draw: st.DrawFn, text: st.SearchStrategy[str], ids: st.SearchStrategy[str]) -> list[dict[str, Any]]:
    """One or two calls, whose arguments are an object or JSON text."""
    count = draw(st.integers(1, 2))
    arguments = objects(text, json_values(text)) | json_texts(text)
    chosen = draw(st.lists(ids, min_size=count, max_size=count, unique=draw(st.booleans())))
    return [{"id": i, "function": {"name": draw(NAMES), "arguments": draw(arguments)}} for i in chosen]


@st.composite
def tool_definitions(draw: st.DrawFn, text: st.SearchStrategy[str]) -> list[dict[str, Any]] | None:
    """No tools, or one or two."""
    if draw(st.booleans()):
        return None
    properties = {"type": "object", "properties": {"x": {"type": "string", "description": draw(text)}}}
    function = {"name": draw(NAMES), "description": draw(text), "parameters": properties}
    bare = {"name": "bare", "parameters": {}}
    return [{"type": "function", "function": f} for f in draw(st.sampled_from([[function], [function, bare], [bare]]))]


@st.composite
def conversations(draw: st.DrawFn, text: st.SearchStrategy[str], thoughts: bool) -> list[dict[str, Any]]:
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
            message["content"] = draw(text | json_texts(text))
            message["tool_call_id"] = pending.pop(draw(st.integers(0, len(pending) - 1))) if pending else draw(ids)
            if draw(st.booleans()):
                message["name"] = draw(NAMES)
        elif role == "assistant" and draw(st.booleans()):
            message["tool_calls"] = draw(tool_calls(text, ids))
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
