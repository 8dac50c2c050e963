"""Encoding conversations so that text cannot bring in control tokens."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .template import Message, check_messages, rendering

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Surrogates, which no text that can be encoded contains: one breaks up control tokens until the text is encoded, the
# other stands for all that the text itself has.
_MARK, _SURROGATE = "\ud800", "\udfff"
# The library puts this at the end of the message to be continued, and cuts the rendered text there.
_CONTINUATION_TAG = "CONTINUE_FINAL_MESSAGE_TAG"
_KEEP = "surrogatepass"  # how to encode and decode surrogates
_NOTHING = "(?!)"  # a pattern that never matches


def encode_conversation(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    *,
    tools: Sequence[Any] | None = None,
    chat_template: str | None = None,
    add_generation_prompt: bool = False,
    continue_final_message: bool = False,
    **template_arguments: Any,
) -> list[int]:
    """Encode a conversation so that the only control tokens are those that the template writes.

    ``tokenizer.apply_chat_template`` renders one string and encodes it, so an ``[INST]`` or ``</s>`` in a message, in a
    tool's result or in its description becomes the control token. Here it stays text, however it is spelled, and the
    ids are those of Mistral's own tokenizer.

    JSON text (the arguments of a call, a tool's result) is parsed here. A template gets arguments as
    ``json.dumps(value, ensure_ascii=False)`` writes them, and such text of a result also as ``content_json``.

    Args:
        tokenizer: A converted Mistral tokenizer.
        messages: As for ``apply_chat_template``.
        tools: As for ``apply_chat_template``.
        chat_template: As for ``apply_chat_template``.
        add_generation_prompt: As for ``apply_chat_template``.
        continue_final_message: As for ``apply_chat_template``.
        **template_arguments: More variables for the template.

    Returns:
        The token ids, beginning with that of ``<s>``.

    Raises:
        ValueError: The template refuses the conversation or fails on it, a value is not of a type of JSON, or a text
            cannot be encoded.
    """
    from transformers.utils.chat_template_utils import get_json_schema

    control = {token.content: i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    pattern = re.compile("|".join(map(re.escape, sorted(control, key=len, reverse=True))) or _NOTHING)
    check_messages(messages)
    schemas = [get_json_schema(tool) if callable(tool) else tool for tool in tools or []]
    with rendering("The conversation is refused"):
        protected = _protection([*control, _CONTINUATION_TAG], replace_surrogates=not _falls_back_on_bytes(tokenizer))
        rendered = tokenizer.apply_chat_template(
            _map_texts([_with_rewritten_json(message) for message in messages], protected),
            tools=_map_texts(schemas, protected) or None,
            chat_template=chat_template,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tokenize=False,
            **_map_texts(template_arguments, protected),
        )
    assert isinstance(rendered, str)
    ids: list[int] = []
    position = 0
    for match in pattern.finditer(rendered):
        ids += _encode_text(tokenizer, rendered[position : match.start()])
        ids.append(control[match.group()])
        position = match.end()
    return ids + _encode_text(tokenizer, rendered[position:])


def _encode_text(tokenizer: PreTrainedTokenizerBase, marked: str) -> list[int]:
    text = marked.replace(_MARK, "")
    if _SURROGATE in text:
        raise ValueError("The conversation is refused: a text is not valid Unicode: remove its surrogates.")
    return list(tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)) if text else []


def _falls_back_on_bytes(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether it is a SentencePiece tokenizer, not one of bytes from the start (tekken)."""
    return bool(tokenizer.backend_tokenizer.model.byte_fallback)


def _protection(tokens: Sequence[str], *, replace_surrogates: bool) -> Callable[[str], str]:
    """A function that puts the mark after the first character of every token in a text, and of one that may go on.

    The end of a text may be the beginning of a token, whose rest is in a text that a template joins to it.

    Args:
        tokens: The tokens to look for.
        replace_surrogates: Whether surrogates are joined or replaced, as by tiktoken, or refused, as by SentencePiece.
    """
    rests: dict[str, list[str]] = {}
    for token in tokens:
        if len(token) < 2:
            raise ValueError(f"the special token {token!r} of one character cannot be told from text")
        rests.setdefault(token[0], []).append(re.escape(token[1:]))
    # Tokens may overlap, so each beginning of one is found on its own.
    beginning = re.compile("|".join(f"{re.escape(first)}(?={'|'.join(rest)})" for first, rest in rests.items()))

    beginnings = {token[:end] for token in tokens for end in range(1, len(token))}
    longest = max(map(len, beginnings), default=0)

    def protected(text: str) -> str:
        if not replace_surrogates:
            text = re.sub("[\ud800-\udfff]", _SURROGATE, text)
        elif re.search("[\ud800-\udfff]", text):
            text = text.encode("utf-16", _KEEP).decode("utf-16", "replace")
        may_go_on = any(text[-count:] in beginnings for count in range(1, min(longest, len(text)) + 1))
        return beginning.sub(lambda match: match.group() + _MARK, text) + (_MARK if may_go_on else "")

    return protected


def _map_texts(value: Any, change: Callable[[str], str]) -> Any:
    """A nested value of JSON's types with every string and key changed."""
    if isinstance(value, str):
        return change(value)
    if value is None or isinstance(value, int | float):
        return value
    if isinstance(value, Mapping):
        return {_map_texts(key, change): _map_texts(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_map_texts(item, change) for item in value]
    raise ValueError(f"A value is of type {type(value).__name__}: give text, numbers, lists and dictionaries.")


def _with_rewritten_json(message: Message) -> Message:
    """A message whose JSON text is in the spelling of Mistral's tokenizer; a result's is added as ``content_json``."""
    if message.get("role") == "tool":
        written: str | bool
        try:
            written = _rewritten(_text_of(message.get("content")))
        except (ValueError, RecursionError):  # only some versions parse results, so the template refuses it
            written = False
        return {**message, "content_json": written}
    calls = message.get("tool_calls")
    if message.get("role") == "assistant" and isinstance(calls, list | tuple):
        return {**message, "tool_calls": [_call_with_rewritten_json(call) for call in calls]}
    return message


def _call_with_rewritten_json(call: Any) -> Any:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping):
        return call
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        arguments = _rewritten(arguments)
    elif isinstance(arguments, Mapping):  # Mistral's tokenizer writes and parses them, which joins surrogates
        arguments = _map_texts(arguments, lambda text: text.encode("utf-16", _KEEP).decode("utf-16", _KEEP))
    return {**call, "function": {**function, "arguments": arguments}} if "arguments" in function else call


def _text_of(content: Any) -> str:
    """The text of a message's content, as the templates join it; of content that is a mapping, its JSON."""
    if isinstance(content, Mapping):
        return json.dumps(content)
    parts = content if isinstance(content, list | tuple) else [{"text": content}]
    texts = [part.get("text") for part in parts if isinstance(part, Mapping)]
    return "\n\n".join(text for text in texts if isinstance(text, str) and text)


def _rewritten(text: str) -> str:
    """JSON text in the one spelling of Mistral's tokenizer; other text as a JSON string, and no text as an object."""
    try:
        value = json.loads(text or "{}")
    except json.JSONDecodeError:
        value = text
    return json.dumps(value, ensure_ascii=False)
