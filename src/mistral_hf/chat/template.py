"""Chat templates by tokenizer version."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Message = Mapping[str, Any]

# The tokenizer versions with a chat template; a version writes the same with either kind of tokenizer.
TEMPLATES = {
    "v1": "v1.jinja",
    "v2": "v2.jinja",
    "v3": "v3.jinja",
    "v3-tekken": "v3.jinja",
    "v7": "v7.jinja",
    "v7-tekken": "v7.jinja",
    "v11": "v11.jinja",
    "v13": "v13.jinja",
    "v15": "v13.jinja",
}


def get_chat_template(version: str, settings: Mapping[str, Any] | None = None) -> str:
    """The Jinja chat template for a tokenizer version.

    It renders the text that Mistral's own tokenizer encodes for the same conversation, and raises an error for the
    conversations that Mistral's tokenizer refuses. The assistant's parts are marked for
    ``return_assistant_tokens_mask=True``.

    Jinja cannot parse JSON. Arguments of a call, and in versions 2 and 3 results of a tool, that are given as JSON text
    are written as they are, where Mistral's tokenizer writes them as ``json.dumps(value, ensure_ascii=False)`` does:
    give them in that spelling, or parsed, or call `encode_conversation`, which takes any spelling.

    Args:
        version: One of `TEMPLATES`, such as ``"v3"`` or ``"v7-tekken"``.
        settings: For version 15, what the model's tokenizer file allows: the values of ``reasoning_effort``
            (``efforts``), the one that counts if none is given (``effort``), and whether a ``response_format`` may be
            given (``schema``). Without it, none of them.

    Returns:
        The template's text, for ``tokenizer.chat_template``.

    Raises:
        ValueError: There is no template for this version.
    """
    if version not in TEMPLATES:
        raise ValueError(f"There is no chat template for version {version!r}: give one of {', '.join(TEMPLATES)}.")
    folder = Path(__file__).with_name("templates")
    number = version.removesuffix("-tekken").removeprefix("v")
    parts = [(folder / name).read_text("utf-8") for name in ("turns.jinja", TEMPLATES[version])]
    known = json.dumps(settings or {"efforts": [], "effort": "", "schema": False}) if version == "v15" else "{}"
    return f"{{%- set version = {number} -%}}\n{{%- set settings = {known} -%}}\n" + "".join(parts)


def validate_conversation(
    messages: Sequence[Message], version: str, tools: Sequence[Any] | None = None, *, to_answer: bool = False
) -> None:
    """Check a conversation against the rules of a tokenizer version.

    Args:
        messages: Dictionaries with ``role``, ``content``, ``tool_calls`` and so on, as ``apply_chat_template`` takes
            them.
        version: One of `TEMPLATES`.
        tools: JSON schemas of the tools, or functions to derive them from.
        to_answer: Whether the model answers next, so that the last message cannot be the assistant's.

    Raises:
        ValueError: Roles are in a wrong order, tool results do not match calls, an id or a function name is malformed,
            or content is missing or of a wrong type.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    check_messages(messages)
    present = [{key: value for key, value in message.items() if value is not None} for message in messages]
    with rendering(f"Invalid conversation for version {version}"):
        render_jinja_template(
            conversations=[present],
            tools=None if tools is None else list(tools),
            chat_template=get_chat_template(version),
            add_generation_prompt=to_answer,
            bos_token="<s>",
            eos_token="</s>",
        )


def check_messages(messages: Sequence[Message]) -> None:
    """Check that a conversation is a list of mappings and not empty.

    Raises:
        ValueError: It does not.
    """
    if not isinstance(messages, Sequence) or not messages:
        raise ValueError("A conversation must be a list of at least one message.")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise ValueError(
                f"Message {i} is of type {type(message).__name__}: give a dictionary with role and content."
            )


@contextmanager
def rendering(refusal: str) -> Iterator[None]:
    """Within the block, whatever a template raises is a ValueError: a template is a program, and may raise anything.

    Args:
        refusal: Comes before the reason that a template gives for refusing the conversation.
    """
    from jinja2 import TemplateError

    try:
        yield
    except (TemplateError, ValueError) as error:
        raise ValueError(f"{refusal}: {error}") from error
    except RecursionError as error:
        raise ValueError("The conversation or a tool is nested too deeply: make it flatter.") from error
    except Exception as error:
        raise ValueError(f"The chat template fails on the conversation ({error!r}): use another template.") from error
