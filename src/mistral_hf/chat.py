"""Chat templates by tokenizer version, and encoding that no control token can be smuggled into."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = Mapping[str, Any]
TEMPLATES = {
    "v1": "v1.jinja",
    "v2": "v2.jinja",
    "v3": "v3.jinja",
    "v3-tekken": "v3.jinja",
    "v7": "v7.jinja",
    "v7-tekken": "v7.jinja",
    "v11": "v11.jinja",
    "v13": "v13.jinja",
}
"""The tokenizer versions with a chat template. A version writes the same with either kind of tokenizer."""


def get_chat_template(version: str) -> str:
    """The Jinja chat template for a tokenizer version.

    It renders what Mistral's own tokenizer encodes for the same conversation, and raises for the conversations that
    that one refuses. The assistant's parts are marked for `return_assistant_tokens_mask=True`.

    Args:
        version: One of `TEMPLATES`, such as `"v3"` or `"v7-tekken"`.

    Returns:
        The template's text, for `tokenizer.chat_template`.

    Raises:
        ValueError: If there is none for this version.
    """
    if version not in TEMPLATES:
        raise ValueError(f"no chat template for version {version!r}: there are {', '.join(TEMPLATES)}")
    folder = Path(__file__).with_name("chat_templates")
    number = version.removesuffix("-tekken").removeprefix("v")
    parts = [(folder / name).read_text("utf-8") for name in ("turns.jinja", TEMPLATES[version])]
    return f"{{%- set version = {number} -%}}\n" + "".join(parts)


def validate_conversation(
    messages: Sequence[Message], version: str, tools: Sequence[Any] | None = None, *, to_answer: bool = False
) -> None:
    """Check a conversation against the rules of a tokenizer version.

    Args:
        messages: Dictionaries with `role`, `content`, `tool_calls` and so on, as `apply_chat_template` takes them.
        version: One of `TEMPLATES`.
        tools: JSON schemas of the tools, or functions to make them of.
        to_answer: Whether the model is to answer, so that the last message cannot be the assistant's.

    Raises:
        ValueError: If roles follow each other in a wrong order, tool results do not match calls, an id or a function
            name is malformed, or content is missing or of a wrong type.
    """
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    if not messages:
        raise ValueError("a conversation must have at least one message")
    present = [{key: value for key, value in message.items() if value is not None} for message in messages]
    try:
        render_jinja_template(
            conversations=[present],
            tools=None if tools is None else list(tools),
            chat_template=get_chat_template(version),
            add_generation_prompt=to_answer,
            bos_token="<s>",
            eos_token="</s>",
        )
    except TemplateError as error:
        raise ValueError(f"invalid conversation for version {version}: {error}") from error


def encode_conversation(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    *,
    tools: Sequence[Any] | None = None,
    add_generation_prompt: bool = False,
    continue_final_message: bool = False,
    **template_arguments: Any,
) -> list[int]:
    """Encode a conversation so that the only control tokens are those that the template writes itself.

    `tokenizer.apply_chat_template` renders one string and encodes it, so an `[INST]` or `</s>` inside a message, a
    tool's result or its description becomes the control token. Here it stays text, as in Mistral's own tokenizer,
    whose ids these are.

    Args:
        tokenizer: A converted Mistral tokenizer.
        messages: As for `apply_chat_template`.
        tools: As for `apply_chat_template`.
        add_generation_prompt: As for `apply_chat_template`.
        continue_final_message: As for `apply_chat_template`.
        **template_arguments: More variables for the template.

    Returns:
        The token ids, beginning with that of `<s>`.
    """
    from transformers.utils.chat_template_utils import get_json_schema

    control = {token.content: i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    pattern = re.compile("|".join(map(re.escape, sorted(control, key=len, reverse=True))))
    schemas = [tool if isinstance(tool, Mapping) else get_json_schema(tool) for tool in tools or []]
    mark = _unused_character([list(messages), schemas, template_arguments])
    rendered = tokenizer.apply_chat_template(
        _marked(list(messages), pattern, mark),
        tools=_marked(schemas, pattern, mark) or None,
        add_generation_prompt=add_generation_prompt,
        continue_final_message=continue_final_message,
        tokenize=False,
        **_marked(template_arguments, pattern, mark),
    )
    assert isinstance(rendered, str)
    ids: list[int] = []
    position = 0
    for match in pattern.finditer(rendered):
        ids += _encode_text(tokenizer, rendered[position : match.start()].replace(mark, ""))
        ids.append(control[match.group()])
        position = match.end()
    return ids + _encode_text(tokenizer, rendered[position:].replace(mark, ""))


def _encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)) if text else []


def _unused_character(value: Any) -> str:
    """A private-use character that occurs in no string of a nested value."""
    used = set(_characters(value))
    return next(chr(code) for code in range(0xE000, 0xF900) if chr(code) not in used)


def _characters(value: Any) -> set[str]:
    if isinstance(value, str):
        return set(value)
    if isinstance(value, Mapping):
        return _characters([*value.keys(), *value.values()])
    if isinstance(value, list | tuple):
        return set().union(*map(_characters, value))
    return set()


def _marked(value: Any, pattern: re.Pattern[str], mark: str) -> Any:
    """Put the mark behind the first character of every control token in a nested value's strings and keys."""
    if isinstance(value, str):
        return pattern.sub(lambda match: match.group()[0] + mark + match.group()[1:], value)
    if isinstance(value, Mapping):
        return {_marked(key, pattern, mark): _marked(item, pattern, mark) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_marked(item, pattern, mark) for item in value]
    return value
