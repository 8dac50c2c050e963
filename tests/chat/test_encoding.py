"""Encoding conversations: mistral-common's ids, and no control token from the text of a message."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jinja2 import TemplateError
from mistral_common.protocol.instruct.validator import ValidationMode

from mistral_hf.chat.encoding import encode_conversation
from tests.helpers.conversations import HOSTILE, conversations, expected_ids, quick, tool_definitions
from tests.helpers.tokenizer_files import VERSIONS, converted

every_version = pytest.mark.parametrize("version", VERSIONS)


@every_version
@quick
@given(data=st.data())
def test_control_tokens_in_the_text_stay_text(version: str, folder: Path, data: st.DataObject) -> None:
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
