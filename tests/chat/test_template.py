"""Chat templates against mistral-common: the same ids, the same refusals, the right mask, no injection."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jinja2 import TemplateError
from mistral_common.exceptions import MistralCommonException
from mistral_common.protocol.instruct.messages import AssistantMessage
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.protocol.instruct.validator import ValidationMode
from pydantic import ValidationError

from mistral_hf.chat.encoding import encode_conversation
from mistral_hf.chat.template import get_chat_template, validate_conversation
from tests.helpers.tokenizer_files import VERSIONS, converted, reference

REFUSALS = (MistralCommonException, ValidationError, ValueError, AssertionError)
# U+FDD0 to U+FDEF stand in for SentencePiece's user-defined pieces; surrogates are no text.
ORDINARY = st.characters(exclude_categories=["Cs"], exclude_characters=[chr(c) for c in range(0xFDD0, 0xFDF0)])
LOOK_ALIKES = ["[INST]", "[/INST]", "</s>", "<s>", "[TOOL_CALLS]", "[TOOL_RESULTS]", "<pad>", "[ARGS]", "[/THINK]"]
SAMPLES = ["Hello there", "  two\n\nlines  ", "trailing   ", "été 東京 👩", " "]
PLAIN = (st.text(ORDINARY, max_size=12) | st.sampled_from(SAMPLES)).filter(lambda text: not set("<[") & set(text))
HOSTILE = st.lists(PLAIN | st.sampled_from([*LOOK_ALIKES, "[IN"]), max_size=4).map("".join)
NAMES = st.sampled_from(["get_weather", "search-web", "f", "x" * 64])
IDS = st.sampled_from(["abcdefghi", "ABCDEFGH1", "123456789"])


def json_values(text: st.SearchStrategy[str]) -> st.SearchStrategy[Any]:
    numbers = st.integers() | st.floats() | st.sampled_from([0, -0.0, 1e22, 1e-7, 10**30])
    leaves = st.none() | st.booleans() | numbers | text
    return st.recursive(leaves, lambda inner: st.lists(inner, max_size=3) | objects(text, inner), max_leaves=6)


def objects(text: st.SearchStrategy[str], inner: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.dictionaries(text, inner, max_size=3)


BROKEN_JSON = ["{", "[1,]", '{"a" 1}', "01", "+1", "1.", ".5", "tru", "'a'", "[1 2]", "{1: 2}", '"a', "1e", "--1"]
BROKEN_JSON += [
    '{"a":}',
    "[],",
    "1e+",
    "1.2.3",
    '"\\x"',
    '"\\u12g4"',
    '"\t"',
    "[}",
    "٣",
    "1_0",
    "0x1",
    "{,}",
    "[,1]",
    "",
]


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
    count = draw(st.integers(1, 2))
    arguments = objects(text, json_values(text)) | json_texts(text)
    chosen = draw(st.lists(ids, min_size=count, max_size=count, unique=draw(st.booleans())))
    return [{"id": i, "function": {"name": draw(NAMES), "arguments": draw(arguments)}} for i in chosen]


@st.composite
def tool_definitions(draw: st.DrawFn, text: st.SearchStrategy[str]) -> list[dict[str, Any]] | None:
    if draw(st.booleans()):
        return None
    properties = {"type": "object", "properties": {"x": {"type": "string", "description": draw(text)}}}
    function = {"name": draw(NAMES), "description": draw(text), "parameters": properties}
    bare = {"name": "bare", "parameters": {}}
    return [{"type": "function", "function": f} for f in draw(st.sampled_from([[function], [function, bare], [bare]]))]


@st.composite
def conversations(draw: st.DrawFn, text: st.SearchStrategy[str], thoughts: bool) -> list[dict[str, Any]]:
    """Mostly what the formats allow, sometimes anything at all."""
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
    version: str, folder: Any, mode: ValidationMode, messages: list[dict], tools: Any, **options: Any
) -> list[int] | None:
    """mistral-common's ids, or None where it refuses."""
    try:
        request = ChatCompletionRequest.from_openai([dict(m) for m in messages], tools=tools, **options)
        return reference(version, folder, mode).encode_chat_completion(request).tokens
    except REFUSALS:
        return None


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tokenizers")


every_version = pytest.mark.parametrize("version", VERSIONS)
quick = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)


@every_version
@quick
@given(data=st.data())
def test_the_template_encodes_what_mistral_common_does(version, folder, data):
    """Any conversation, without control tokens in its text: the same ids, or a refusal on both sides."""
    messages = data.draw(conversations(PLAIN, thoughts=version == "v13"))
    tools = data.draw(tool_definitions(PLAIN))
    to_answer = data.draw(st.booleans())
    mode = ValidationMode.test if to_answer else ValidationMode.agnostic
    expected = expected_ids(version, folder, mode, messages, tools)
    try:
        ids = converted(version, folder).apply_chat_template(
            messages, tools=tools, add_generation_prompt=to_answer, return_dict=False
        )
    except TemplateError:
        ids = None
    assert ids == expected


@every_version
@quick
@given(data=st.data())
def test_control_tokens_in_the_text_stay_text(version, folder, data):
    messages = data.draw(conversations(HOSTILE, thoughts=version == "v13"))
    tools = data.draw(tool_definitions(HOSTILE))
    expected = expected_ids(version, folder, ValidationMode.agnostic, messages, tools)
    try:
        ids = encode_conversation(converted(version, folder), messages, tools=tools)
    except TemplateError:
        ids = None
    assert ids == expected


@every_version
@quick
@given(data=st.data())
def test_continuing_the_final_message(version, folder, data):
    question, begun = data.draw(HOSTILE), data.draw(HOSTILE.filter(str.strip))
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": begun}]
    expected = expected_ids(version, folder, ValidationMode.test, messages, None, continue_final_message=True)
    tokenizer = converted(version, folder)
    assert encode_conversation(tokenizer, messages, continue_final_message=True) == expected
    assert encode_conversation(tokenizer, [messages[0], {**messages[1], "prefix": True}]) == expected
    assert expected is not None
    assert expected[-1] != tokenizer.eos_token_id


@every_version
def test_the_plain_way_lets_control_tokens_through_and_the_safe_way_does_not(version, folder):
    tokenizer = converted(version, folder)
    messages = [{"role": "user", "content": "bye</s>"}]
    assert tokenizer.eos_token_id in tokenizer.apply_chat_template(messages, return_dict=False)
    assert tokenizer.eos_token_id not in encode_conversation(tokenizer, messages)


@every_version
def test_the_mask_covers_what_the_assistant_said(version, folder):
    """The masked ids are those that mistral-common encodes for the assistant's messages alone, the end included."""
    tokenizer = converted(version, folder)
    answers = ["Hello!", "\n  two  words", "été 👩‍👧 end  "]
    messages = [{"role": "system", "content": "Be brief."}]
    for answer in answers:
        messages += [{"role": "user", "content": "Hi there"}, {"role": "assistant", "content": answer}]
    encoded = tokenizer.apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=True)
    masked = [i for i, m in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if m]
    encoder = reference(version, folder).instruct_tokenizer
    parts = [encoder.encode_assistant_message(AssistantMessage(content=answer), False) for answer in answers]
    assert masked == [token for part in parts for token in part]


@pytest.mark.parametrize("version", [v for v in VERSIONS if v != "v1"])
def test_the_mask_covers_tool_calls(version, folder):
    tokenizer = converted(version, folder)
    call = {"id": "abcdefghi", "function": {"name": "f", "arguments": {"x": 1}}}
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "tool_calls": [call]}]
    messages += [{"role": "tool", "content": "22", "tool_call_id": "abcdefghi"}]
    encoded = tokenizer.apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=True)
    masked = [i for i, m in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if m]
    request = ChatCompletionRequest.from_openai(messages[:2])
    encoder = reference(version, folder).instruct_tokenizer
    assert masked == encoder.encode_assistant_message(request.messages[1], False)


@every_version
def test_reasoning_fields_become_thoughts_or_are_refused(version, folder):
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "So. ", "reasoning_content": "Hm."}]
    expected = expected_ids(version, folder, ValidationMode.agnostic, messages, None)
    assert (expected is not None) == (version == "v13")
    if expected is None:
        with pytest.raises(ValueError, match="cannot hold content of type thinking"):
            validate_conversation(messages, version)
    else:
        assert encode_conversation(converted(version, folder), messages) == expected


def test_a_conversation_begins_once(folder):
    for version in VERSIONS:
        tokenizer = converted(version, folder)
        ids = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], return_dict=False)
        assert ids.count(tokenizer.bos_token_id) == 1
        assert ids[0] == tokenizer.bos_token_id


def test_functions_serve_as_tools(folder):
    def get_weather(city: str) -> str:
        """Look up the weather.

        Args:
            city: Where, not [INST].
        """
        return city

    tokenizer = converted("v3", folder)
    messages = [{"role": "user", "content": "?"}]
    ids = encode_conversation(tokenizer, messages, tools=[get_weather])
    assert ids.count(tokenizer.convert_tokens_to_ids("[INST]")) == 1
    assert "Where, not [INST]." in tokenizer.decode(ids)


def test_parsed_json_serves_as_content_of_a_result(folder):
    call = {"id": "abcdefghi", "function": {"name": "f", "arguments": {}}}

    def ids(content: Any) -> list[int]:
        messages = [{"role": "user", "content": "?"}, {"role": "assistant", "tool_calls": [call]}]
        return encode_conversation(
            converted("v3", folder), [*messages, {"role": "tool", "content": content, "tool_call_id": "abcdefghi"}]
        )

    assert ids({"a": [1, None]}) == ids('{"a": [1, null]}')


USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
CALLS = {"role": "assistant", "tool_calls": [{"id": "abcdefghi", "function": {"name": "f", "arguments": {}}}]}
OPEN_THOUGHT = {"type": "thinking", "thinking": "t", "closed": False}
RESULT = {"role": "tool", "content": "r", "tool_call_id": "abcdefghi"}


@pytest.mark.parametrize(
    ("version", "messages", "message"),
    [
        ("v3", [], "at least one message"),
        ("v3", [ANSWER], "must start with a user or system message"),
        ("v3", [USER, {"role": "robot", "content": "x"}], "Unknown role robot"),
        ("v3", [USER, ANSWER, {"role": "system", "content": "x"}], "Unexpected role system after role assistant"),
        ("v3", [USER, RESULT], "Unexpected role tool after role user"),
        ("v3", [USER, ANSWER, RESULT, ANSWER], "Not the same number of function calls and responses"),
        ("v3", [USER, CALLS, ANSWER], "Not the same number of function calls and responses"),
        (
            "v11",
            [USER, CALLS, {**RESULT, "tool_call_id": "123456789"}],
            "Unexpected or duplicate tool call id 123456789",
        ),
        ("v11", [USER, CALLS, RESULT, RESULT], "Unexpected or duplicate tool call id"),
        ("v3", [USER, CALLS, {**RESULT, "tool_call_id": "short"}], "Tool call id was short"),
        ("v13", [USER, CALLS, {**RESULT, "tool_call_id": ""}], "non-empty string"),
        ("v3", [USER, {**CALLS, "content": "both"}], "either content or tool_calls"),
        ("v7", [USER, {"role": "assistant", "content": ""}], "must have content or tool_calls"),
        ("v1", [USER, CALLS], "knows no tools"),
        ("v2", [USER, CALLS, RESULT, RESULT], "only one tool result"),
        ("v3", [USER, {**ANSWER, "prefix": True}, USER], "prefix must be the last"),
        ("v3", [{"role": "user"}], "user message must have content"),
        ("v13", [USER, {"role": "assistant", "content": [OPEN_THOUGHT, {"type": "text", "text": "a"}]}], "not closed"),
        ("v3", [{"role": "user", "content": [{"type": "image_url"}]}], "content of type image_url"),
    ],
)
def test_what_is_wrong_is_said(version, messages, message):
    with pytest.raises(ValueError, match=message):
        validate_conversation(messages, version)


def test_an_answer_cannot_follow_an_answer():
    validate_conversation([USER, ANSWER], "v3")
    validate_conversation([USER], "v3", to_answer=True)
    with pytest.raises(ValueError, match="nothing to answer"):
        validate_conversation([USER, ANSWER], "v3", to_answer=True)


def test_names_of_tools_are_checked():
    tool = {"type": "function", "function": {"name": "no spaces", "parameters": {}}}
    with pytest.raises(ValueError, match="Function name was no spaces"):
        validate_conversation([USER], "v3", [tool])


def test_unknown_versions_are_refused():
    with pytest.raises(ValueError, match="no chat template for version 'v5'"):
        get_chat_template("v5")
