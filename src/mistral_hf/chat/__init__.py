"""Conversations: chat templates by tokenizer version, checks, and encoding."""

from .encoding import encode_conversation
from .template import get_chat_template, validate_conversation

__all__ = ["encode_conversation", "get_chat_template", "validate_conversation"]
