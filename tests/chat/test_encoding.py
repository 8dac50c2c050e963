"""Encoding conversations: mistral-common's ids, and no control token from the text of a message."""

from __future__ import annotations

import copy
import json
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mistral_common.protocol.instruct.validator import ValidationMode
from pydantic import BaseModel as PydanticModel
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from mistral_hf.chat.encoding import encode_conversation
from mistral_hf.chat.template import validate_conversation
from tests.helpers.conversations import (
    BROKEN,
    HOSTILE,
    conversations,
    expected_ids,
    json_texts,
    quick,
    tool_definitions,
)
from tests.helpers.tokenizer_files import THINKING, VERSIONS, converted

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
    messages = data.draw(conversations(text, json_texts(text), thoughts=version in THINKING))
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


@every_version
@pytest.mark.parametrize("role", ["user", "assistant"])
def test_a_control_token_cut_in_two_texts_stays_text(role: str, version: str, folder: Path) -> None:
    """Some versions join the texts of a message without anything between them."""
    for token in ("[INST]", "</s>", "[/INST]", "[TOOL_CALLS]"):
        for cut in range(1, len(token)):
            parts = [{"type": "text", "text": text} for text in ("a" + token[:cut], token[cut:] + "b")]
            messages = [USER, {"role": role, "content": parts}, {"role": "user", "content": token[:cut]}]
            expected = expected_ids(version, folder, ValidationMode.agnostic, messages, None)
            assert outcome(version, folder, messages) == expected


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


def refused(version: str, folder: Path, messages: Any, **options: Any) -> str:
    with pytest.raises(ValueError, match=r".") as error:
        encode_conversation(converted(version, folder), messages, **options)
    return str(error.value)


@every_version
@pytest.mark.parametrize("part", [{"text": None}, {"text": 5}, {}, {"text": b"bytes"}, {"text": ["a"]}, {"text": {}}])
def test_parts_without_text_are_refused(version: str, folder: Path, part: dict[str, Any]) -> None:
    for role in ("user", "system", "assistant", "tool"):
        message = {"role": role, "content": [{"type": "text", **part}], "tool_call_id": "abcdefghi"}
        messages = [USER, call("{}"), message] if role == "tool" else [USER, message, USER]
        messages = [message, USER] if role == "system" else messages
        if part != {"text": b"bytes"}:  # which mistral-common decodes
            assert expected_ids(version, folder, ValidationMode.agnostic, messages, None) is None
        refused(version, folder, messages)


@pytest.mark.parametrize("part", [{"thinking": None}, {"thinking": 5}, {}])
def test_thoughts_without_text_are_refused(folder: Path, part: dict[str, Any]) -> None:
    messages = [USER, {"role": "assistant", "content": [{"type": "thinking", **part}]}]
    assert expected_ids("v13", folder, ValidationMode.agnostic, messages, None) is None
    assert "Content of type thinking in a assistant message must be text" in refused("v13", folder, messages)


@pytest.mark.parametrize("arguments", [5, 1.5, True, ["a"], [], 0, False])
def test_arguments_that_are_neither_an_object_nor_text_are_refused(folder: Path, arguments: Any) -> None:
    assert expected_ids("v3", folder, ValidationMode.agnostic, [USER, call(arguments)], None) is None
    assert "Arguments of f must be an object or JSON text" in refused("v3", folder, [USER, call(arguments)])


class Custom(PydanticModel):
    role: str
    content: str


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "at least one message"),
        (["hi"], "Message 0 is of type str"),
        ("hi", "Message 0 is of type str"),
        ([USER, None], "Message 1 is of type NoneType"),
        ([Custom(role="user", content="bye</s>")], "Message 0 is of type Custom"),
        ([{"role": "user", "content": Custom(role="user", content="bye</s>")}], "A value is of type Custom"),
        ([{"role": "user", "content": b"hi"}], "A value is of type bytes"),
        ([USER, {"role": ["user"], "content": "hi"}], "The chat template fails on the conversation"),
        ([USER, call({"x": {1, 2}})], "A value is of type set"),
        ([USER, {"role": "assistant", "tool_calls": ["f"]}], "A tool call must have a function"),
        ([USER, {"role": "assistant", "tool_calls": "f"}], "tool_calls must be a list"),
    ],
)
def test_messages_that_are_not_of_jsons_types_are_refused(folder: Path, messages: Any, reason: str) -> None:
    """Such as objects, whose text could not be protected."""
    assert reason in refused("v3", folder, messages)
    if reason.startswith("Message"):
        with pytest.raises(ValueError, match=reason):
            validate_conversation(messages, "v3")


def test_nesting_that_is_too_deep_is_refused(folder: Path) -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    assert "nested too deeply" in refused("v3", folder, [USER, call({"x": deep})])
    tool = {"type": "function", "function": {"name": "f", "parameters": {"x": deep}}}
    assert "nested too deeply" in refused("v3", folder, [USER], tools=[tool])
    with pytest.raises(ValueError, match="nested too deeply"):
        validate_conversation([USER, call({"x": deep})], "v3")


WHOLE: list[list[dict[str, Any]]] = [
    [{"role": "system", "content": "s"}, USER, {"role": "assistant", "content": "a"}, USER],
    [USER, call('{"a": 1}'), result('{"x": [1]}', name="f"), {"role": "assistant", "content": "a"}],
    [{"role": "user", "content": [{"type": "text", "text": "p"}, {"type": "text", "text": "q"}]}],
]
TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}
ODD = [None, 5, 0, True, False, "", [], {}, "x", ["x"], {"a": "b"}, 1.5, "null", "abcdefghi", [None], [[]], [{}]]


def places_in(value: Any) -> list[tuple[Any, Any]]:
    """The containers and keys of everything in a nested value, except in the schema of a tool's parameters."""
    keys = value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else []
    below = [place for key in keys if key != "parameters" for place in places_in(value[key])]
    return [*((value, key) for key in keys), *below]


@pytest.mark.parametrize("version", ["v1", "v2", "v3", "v7-tekken", "v11", "v13"])
@settings(quick, max_examples=60)
@given(data=st.data())
def test_malformed_conversations_are_refused_where_mistral_common_refuses_them(
    version: str, folder: Path, data: st.DataObject
) -> None:
    messages, tools = copy.deepcopy((data.draw(st.sampled_from(WHOLE)), [TOOL]))
    for _ in range(data.draw(st.integers(1, 2))):
        container, key = data.draw(st.sampled_from(places_in(messages) + places_in(tools)))
        if isinstance(container, dict) and data.draw(st.booleans()):
            del container[key]
        else:
            container[key] = copy.deepcopy(data.draw(st.sampled_from(ODD)))
    got = outcome(version, folder, messages, tools)
    try:
        expected = expected_ids(version, folder, ValidationMode.agnostic, copy.deepcopy(messages), copy.deepcopy(tools))
    except (KeyError, TypeError, AttributeError):
        return  # mistral-common fails without a decision
    if any(isinstance(m, dict) and m.get("role") == "tool" and isinstance(m.get("content"), dict) for m in messages):
        return  # mistral-common takes only text as a tool's result
    assert got == expected


@every_version
def test_all_characters_for_private_use_may_be_in_one_text(version: str, folder: Path) -> None:
    text = "".join(map(chr, range(0xE000, 0xF900))) + "</s>"
    messages = [{"role": "user", "content": text}]
    expected = expected_ids(version, folder, ValidationMode.agnostic, messages, None)
    assert outcome(version, folder, messages) == expected


def strip_added_tokens(tokenizer: PreTrainedTokenizerFast) -> str:
    return json.dumps({**json.loads(tokenizer.backend_tokenizer.to_str()), "added_tokens": []})


def test_a_tokenizer_without_special_tokens_encodes_the_template_as_text(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    plain = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(strip_added_tokens(tokenizer)))
    plain.chat_template = "<s>{{ messages[0].content }}"
    ids = encode_conversation(plain, [{"role": "user", "content": "the quick fox"}])
    assert plain.decode(ids) == "<s>the quick fox"


def with_special_tokens(tokenizer: PreTrainedTokenizerFast, *tokens: str) -> PreTrainedTokenizerFast:
    changed = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(strip_added_tokens(tokenizer)))
    changed.add_special_tokens({"additional_special_tokens": list(tokens)})
    changed.chat_template = "<q>{{ messages[0].content }}"
    return changed


def test_control_tokens_that_overlap_stay_text(tokenizer: PreTrainedTokenizerFast) -> None:
    changed = with_special_tokens(tokenizer, "<q>", "zxy", "yvw", "vwzx")
    ids = encode_conversation(changed, [{"role": "user", "content": "zxyvwzxy<q><q>"}])
    special = {i for i, token in changed.added_tokens_decoder.items() if token.special}
    assert [i for i in ids if i in special] == [changed.convert_tokens_to_ids("<q>")] == ids[:1]
    assert changed.decode(ids) == "<q>zxyvwzxy<q><q>"


def test_a_control_token_of_one_character_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match="'q' of one character"):
        encode_conversation(with_special_tokens(tokenizer, "<q>", "q"), [USER])


def test_another_template_may_be_given(folder: Path) -> None:
    tokenizer = converted("v7", folder)
    messages = [{"role": "system", "content": "</s>"}, USER]
    expected = encode_conversation(tokenizer, messages)
    saved, tokenizer.chat_template = tokenizer.chat_template, None
    try:
        assert encode_conversation(tokenizer, messages, chat_template=saved) == expected
    finally:
        tokenizer.chat_template = saved


def test_a_large_result_costs_about_what_a_large_message_costs(folder: Path) -> None:
    """Rendering is linear in the text and cheap beside encoding, however the text is spelled."""
    tokenizer, text = converted("v3", folder), "some </s> words [INST] and \\u0041 \n" * 6000

    def seconds(messages: list[dict[str, Any]]) -> float:
        begin = time.process_time()
        encode_conversation(tokenizer, messages)
        return time.process_time() - begin

    def user() -> float:
        return seconds([{"role": "user", "content": text}])

    def tool(value: Any) -> float:
        return seconds([USER, call(json.dumps(value)), result(json.dumps(value)[: len(text)])])

    user()  # compiles the template
    expected = user()
    assert tool(text) < 4 * expected + 0.5
    assert tool([text[i : i + 20] for i in range(0, len(text), 20)]) < 4 * expected + 0.5
