"""Chat templates against mistral-common: the same ids, the same refusals, the right mask."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jinja2 import TemplateError
from mistral_common.protocol.instruct.messages import AssistantMessage
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.protocol.instruct.validator import ValidationMode

from mistral_hf.chat.encoding import encode_conversation
from mistral_hf.chat.template import get_chat_template, validate_conversation
from tests.helpers.conversations import PLAIN, conversations, expected_ids, quick, tool_definitions, written_json_texts
from tests.helpers.tokenizer_files import THINKING, VERSIONS, converted, reference

every_version = pytest.mark.parametrize("version", VERSIONS)


@every_version
@quick
@given(data=st.data())
def test_the_template_encodes_what_mistral_common_does(version: str, folder: Path, data: st.DataObject) -> None:
    """Any conversation without control tokens in its text gives the same ids, or is refused by both.

    JSON text is in Python's spelling, since the template cannot parse it; `encode_conversation` takes any.
    """
    messages = data.draw(conversations(PLAIN, written_json_texts(PLAIN), thoughts=version in THINKING))
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
def test_the_mask_covers_what_the_assistant_said(version: str, folder: Path) -> None:
    """The masked ids are those that mistral-common encodes for the assistant's messages alone, with their end."""
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
def test_the_mask_covers_tool_calls(version: str, folder: Path) -> None:
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
def test_reasoning_fields_become_thoughts_or_are_refused(version: str, folder: Path) -> None:
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "So. ", "reasoning_content": "Hm."}]
    expected = expected_ids(version, folder, ValidationMode.agnostic, messages, None)
    assert (expected is not None) == (version in THINKING)
    if expected is None:
        with pytest.raises(ValueError, match="cannot hold content of type thinking"):
            validate_conversation(messages, version)
    else:
        assert encode_conversation(converted(version, folder), messages) == expected


USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
SCHEMA = {"type": "object", "properties": {"é": {"type": "string"}, "a": {"enum": [1, None]}}}
FORMATS = [
    None,
    {"type": "text"},
    {"type": "json_object"},
    {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA, "strict": True}},
]


@pytest.mark.parametrize("response_format", FORMATS, ids=lambda given: given and given["type"])
@pytest.mark.parametrize("effort", [None, "none", "high", "low"])
def test_version_15_writes_the_settings_that_mistral_common_does(
    effort: str | None, response_format: dict[str, Any] | None, folder: Path
) -> None:
    """``"low"`` is no value that the tokenizer file allows."""
    messages = [{"role": "system", "content": "Be brief."}, USER, ANSWER, USER]
    given = {"reasoning_effort": effort, "response_format": response_format}
    options = {name: value for name, value in given.items() if value is not None}
    tools = [{"type": "function", "function": {"name": "f", "description": "d", "parameters": {}}}]
    for available in (None, tools):
        expected = expected_ids("v15", folder, ValidationMode.agnostic, messages, available, **options)
        assert (expected is None) == (effort == "low")
        if expected is None:
            with pytest.raises(ValueError, match=r"reasoning_effort must be one of \[none, high\], not low"):
                encode_conversation(converted("v15", folder), messages, tools=available, **options)
        else:
            assert encode_conversation(converted("v15", folder), messages, tools=available, **options) == expected


def test_settings_that_a_tokenizer_file_does_not_have_are_refused(folder: Path) -> None:
    tokenizer, template = converted("v15", folder), get_chat_template("v15")
    bare = tokenizer.apply_chat_template([USER], chat_template=template, tokenize=False)
    assert bare == "<s>[INST]q[/INST]"
    for option, message in (
        ({"reasoning_effort": "high"}, r"reasoning_effort must be one of \[\], not high"),
        ({"response_format": {"type": "json_object"}}, "response_format has type json_object"),
    ):
        with pytest.raises(TemplateError, match=message):
            tokenizer.apply_chat_template([USER], chat_template=template, tokenize=False, **option)


def test_a_conversation_has_one_beginning_token(folder: Path) -> None:
    for version in VERSIONS:
        tokenizer = converted(version, folder)
        ids = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], return_dict=False)
        assert ids.count(tokenizer.bos_token_id) == 1
        assert ids[0] == tokenizer.bos_token_id


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
        ("v15", [{"role": "system", "content": [OPEN_THOUGHT]}], "cannot hold content of type thinking"),
        ("v3", [USER, {**CALLS, "content": "both"}], "either content or tool_calls"),
        ("v7", [USER, {"role": "assistant", "content": ""}], "must have content or tool_calls"),
        ("v1", [USER, CALLS], "has no tools"),
        ("v2", [USER, CALLS, RESULT, RESULT], "only one tool result"),
        ("v3", [USER, {**ANSWER, "prefix": True}, USER], "prefix must be the last"),
        ("v3", [{"role": "user"}], "user message must have content"),
        ("v13", [USER, {"role": "assistant", "content": [OPEN_THOUGHT, {"type": "text", "text": "a"}]}], "not closed"),
        ("v3", [{"role": "user", "content": [{"type": "image_url"}]}], "content of type image_url"),
    ],
)
def test_refusals_name_what_is_wrong(version: str, messages: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        validate_conversation(messages, version)


@pytest.mark.parametrize("version", ["v11", "v13"])
@pytest.mark.parametrize("called", [("ab", "cab"), ("ab", "ca"), ("abc", "cb"), ("a", "a")])
def test_a_result_is_written_once_where_merged_calls_repeat_an_id(
    version: str, called: tuple[str, str], folder: Path
) -> None:
    """Adjacent messages of the assistant become one turn, in which the last call of an id counts."""
    ids = {name: f"call{name}{name}{name}{name}{name}" for name in "abc"}
    first, second = (
        {"role": "assistant", "tool_calls": [{"id": ids[n], "function": {"name": n, "arguments": {}}} for n in names]}
        for names in called
    )
    results = [{"role": "tool", "content": name, "tool_call_id": ids[name]} for name in sorted(called[1])]
    messages = [first, second, *results]
    expected = expected_ids(version, folder, ValidationMode.agnostic, messages, None)
    assert expected is not None
    assert encode_conversation(converted(version, folder), messages) == expected


def test_an_answer_cannot_follow_an_answer() -> None:
    validate_conversation([USER, ANSWER], "v3")
    validate_conversation([USER], "v3", to_answer=True)
    with pytest.raises(ValueError, match="nothing to answer"):
        validate_conversation([USER, ANSWER], "v3", to_answer=True)


def test_names_of_tools_are_checked() -> None:
    tool = {"type": "function", "function": {"name": "no spaces", "parameters": {}}}
    with pytest.raises(ValueError, match="Function name was no spaces"):
        validate_conversation([USER], "v3", [tool])


def test_unknown_versions_are_refused() -> None:
    with pytest.raises(ValueError, match="no chat template for version 'v5'"):
        get_chat_template("v5")
