"""Encoding conversations so that text cannot bring in control tokens."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .template import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def encode_conversation(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    *,
    tools: Sequence[Any] | None = None,
    add_generation_prompt: bool = False,
    continue_final_message: bool = False,
    **template_arguments: Any,
) -> list[int]:
    """Encode a conversation so that the only control tokens are those that the template writes.

    ``tokenizer.apply_chat_template`` renders one string and encodes it, so an ``[INST]`` or ``</s>`` in a message, in a
    tool's result or in its description becomes the control token. Here it stays text, and the ids are those of
    Mistral's own tokenizer.

    Args:
        tokenizer: A converted Mistral tokenizer.
        messages: As for ``apply_chat_template``.
        tools: As for ``apply_chat_template``.
        add_generation_prompt: As for ``apply_chat_template``.
        continue_final_message: As for ``apply_chat_template``.
        **template_arguments: More variables for the template.

    Returns:
        The token ids, beginning with that of ``<s>``.

    Raises:
        jinja2.TemplateError: The template refuses the conversation.
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
    """A character for private use that no string of a nested value contains."""
    used = set(_characters(value))
    return next(chr(code) for code in range(0xE000, 0xF900) if chr(code) not in used)


def _characters(value: Any) -> set[str]:
    """All characters in the strings and keys of a nested value."""
    if isinstance(value, str):
        return set(value)
    if isinstance(value, Mapping):
        return _characters([*value.keys(), *value.values()])
    if isinstance(value, list | tuple):
        return set().union(*map(_characters, value))
    return set()


def _marked(value: Any, pattern: re.Pattern[str], mark: str) -> Any:
    """Insert the mark after the first character of every control token in a nested value's strings and keys."""
    if isinstance(value, str):
        return pattern.sub(lambda match: match.group()[0] + mark + match.group()[1:], value)
    if isinstance(value, Mapping):
        return {_marked(key, pattern, mark): _marked(item, pattern, mark) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_marked(item, pattern, mark) for item in value]
    return value
