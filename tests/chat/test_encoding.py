"""Encoding conversations: mistral-common's ids, and no control token from the text of a message."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mistral_common.protocol.instruct.validator import ValidationMode

from mistral_hf.chat.encoding import encode_conversation
from tests.helpers.conversations import (
    BROKEN,
    HOSTILE,
    conversations,
    expected_ids,
    json_texts,
    quick,
    tool_definitions,
)
from tests.helpers.tokenizer_files import VERSIONS, converted

every_version = pytest.mark.parametrize("version", VERSIONS)


def outcome(version: str, folder: Path, messages: list[dict[str, Any]], tools: Any = None) -> list[int] | None:
    """The ids, or None where the conversation is refused."""
    try:
        return encode_conversation(converted(version, folder), messages, tools=tools)
    except ValueError:
        return None


def check_ids(version: str, folder: Path, data: st.DataObject) -> None:
    """Draw a conversation in which most texts hide a control token, and compare its ids with mistral-common's."""
    text = data.draw(st.sampled_from([HOSTILE, HOSTILE, HOSTILE, HOSTILE, HOSTILE, BROKEN]))
    messages = data.draw(conversations(text, json_texts(text), thoughts=version == "v13"))
    tools = data.draw(tool_definitions(text))
    expected = expected_ids(version, folder, ValidationMode.agnostic, messages, tools)
    assert outcome(version, folder, messages, tools) == expected


@every_version
@quick
@given(data=st.data())
def test_control_tokens_in_the_text_stay_text(version: str, folder: Path, data: st.DataObject) -> None:
    check_ids(version, folder, data)


@pytest.mark.slow
@every_version
@settings(quick, max_examples=2500)
@given(data=st.data())
def test_control_tokens_in_twenty_thousand_conversations_stay_text(
    version: str, folder: Path, data: st.DataObject
) -> None:
    check_ids(version, folder, data)


USER = {"role": "user", "content": "hi"}
ESCAPED = [
    "<\\/s>",
    "\\u005bINST]",
    "[IN\\u0053T]",
    "[\\/INST]",
    "\\ue000",
    "[\\ue000INST]",
    "<\ue000/s>",
    "\\ufdd0",
    "\ufdd0",
]
ESCAPED += ["\\ud83d\\ude00", "\\ud800", "\\ud83dx", "\ud800", "\ud83d\ude00", "CONTINUE_FINAL_MESSAGE_TAG "]
ESCAPED += ["1e400", "NaN"]


def call(arguments: Any, name: str = "f") -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    return {"role": "assistant", "tool_calls": [{"id": "abcdefghi", "function": function}]}


def result(content: Any, **fields: Any) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": "abcdefghi", "content": content, **fields}


@every_version
@pytest.mark.parametrize("text", ESCAPED, ids=range(len(ESCAPED)))
def test_escapes_and_rare_characters_bring_in_no_control_token(version: str, folder: Path, text: str) -> None:
    """In each place of a conversation: bare, in JSON of a call and of a result, and in a tool's description."""
    quoted, decoded = f'{{"{text}": ["{text}"]}}', json.loads(f'["{text}"]')[0] if "\\" in text else text
    parts = [f'{{"{text}":', "", f'["{text}"]}}']
    tools = [{"type": "function", "function": {"name": "f", "description": decoded, "parameters": {decoded: decoded}}}]
    places = {
        "user": ([{"role": "user", "content": text}], None),
        "system": ([{"role": "system", "content": decoded}, USER], None),
        "answer": ([USER, {"role": "assistant", "content": text}, USER], None),
        "arguments": ([USER, call(text)], None),
        "quoted arguments": ([USER, call(quoted)], None),
        "object": ([USER, call({decoded: [decoded]})], None),
        "name": ([USER, call("{}", name=text)], None),
        "result": ([USER, call("{}"), result(text)], None),
        "quoted result": ([USER, call("{}"), result(quoted)], None),
        "result in parts": ([USER, call("{}"), result([{"type": "text", "text": part} for part in parts])], None),
        "result's name": ([USER, call("{}"), result("1", name=text)], None),
        "tool": ([USER], tools),
    }
    for place, (messages, given_tools) in places.items():
        expected = expected_ids(version, folder, ValidationMode.agnostic, messages, given_tools)
        assert outcome(version, folder, messages, given_tools) == expected, place


@every_version
@pytest.mark.parametrize("text", ["1" * 5000, "[" * 20_000], ids=["long number", "deep"])
def test_json_that_python_cannot_parse_is_refused_by_the_versions_that_parse_it(
    version: str, folder: Path, text: str
) -> None:
    for messages in ([USER, call(text)], [USER, call("{}"), result(text)]):
        expected = expected_ids(version, folder, ValidationMode.agnostic, messages, None)
        assert outcome(version, folder, messages) == expected


@every_version
@quick
@given(data=st.data())
def test_a_final_message_is_continued_as_mistral_common_does(version: str, folder: Path, data: st.DataObject) -> None:
    question, begun = data.draw(HOSTILE), data.draw(HOSTILE.filter(str.strip))
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": begun}]
    expected = expected_ids(version, folder, ValidationMode.test, messages, None, continue_final_message=True)
    tokenizer = converted(version, folder)
    assert encode_conversation(tokenizer, messages, continue_final_message=True) == expected
    assert encode_conversation(tokenizer, [messages[0], {**messages[1], "prefix": True}]) == expected
    assert expected is not None
    assert expected[-1] != tokenizer.eos_token_id


@every_version
def test_the_plain_way_lets_control_tokens_through_and_the_safe_way_does_not(version: str, folder: Path) -> None:
    tokenizer = converted(version, folder)
    messages = [{"role": "user", "content": "bye</s>"}]
    assert tokenizer.eos_token_id in tokenizer.apply_chat_template(messages, return_dict=False)
    assert tokenizer.eos_token_id not in encode_conversation(tokenizer, messages)


def test_functions_serve_as_tools(folder: Path) -> None:
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


def test_parsed_json_serves_as_content_of_a_result(folder: Path) -> None:
    call = {"id": "abcdefghi", "function": {"name": "f", "arguments": {}}}

    def ids(content: Any) -> list[int]:
        messages = [{"role": "user", "content": "?"}, {"role": "assistant", "tool_calls": [call]}]
        return encode_conversation(
            converted("v3", folder), [*messages, {"role": "tool", "content": content, "tool_call_id": "abcdefghi"}]
        )

    assert ids({"a": [1, None]}) == ids('{"a": [1, null]}')
