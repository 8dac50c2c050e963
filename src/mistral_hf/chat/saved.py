"""A chat session in a file: the conversation, and the cache, so that nothing is read again."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open

from ..torch.cache import RollingCache
from .session import ChatSession, Memory

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_KEY = "chat_session"
_SAMPLE = 16  # values of every weight that take part in the fingerprint


def save_session(session: ChatSession, file: str | Path) -> None:
    """Write a session to a safetensors file, which appears only when it is complete.

    Raises:
        OSError: The file cannot be written.
    """
    record = {"model": fingerprint(session.model), "messages": session.messages, "ids": session.memory.ids}
    session.memory.cache.save_file(file, {_KEY: json.dumps(record)})


def load_session(session: ChatSession, file: str | Path) -> None:
    """Continue a saved conversation in a session, whose own conversation ends.

    Raises:
        ValueError: The file is damaged, was not written by `save_session`, or belongs to another model.
        OSError: The file cannot be read.
    """
    model = session.model
    devices = [next(layer.parameters()).device for layer in model.model.layers]
    cache = RollingCache.load_file(file, model.config, devices)
    record = _read_record(file)
    if record["model"] != fingerprint(model):
        raise ValueError(f"{file} belongs to another model or other weights: load the model that it was saved with.")
    if len(record["ids"]) != cache.get_seq_length():
        raise ValueError(f"{file} has {len(record['ids'])} ids for {cache.get_seq_length()} tokens: save it again.")
    session.messages, session.memory, session.prefilled = record["messages"], Memory(cache, record["ids"]), 0


def fingerprint(model: PreTrainedModel) -> str:
    """A hash of a model's configuration and of the first values of every weight, quantized or not."""
    fields = {name: value for name, value in model.config.to_dict().items() if name != "transformers_version"}
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True, default=str).encode())
    for name, weight in sorted(model.named_parameters()):
        first = weight.detach().flatten()[:_SAMPLE].cpu().contiguous().view(torch.uint8)
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode() + bytes(first.tolist()))
    return digest.hexdigest()


def _read_record(file: str | Path) -> dict[str, Any]:
    try:
        with safe_open(file, "pt") as content:
            record = json.loads((content.metadata() or {}).get(_KEY, ""))
        valid = isinstance(record["model"], str) and all(type(token) is int for token in record["ids"])
        valid &= all(isinstance(message["role"], str) for message in record["messages"])
    except (ValueError, TypeError, LookupError, RecursionError, SafetensorError):
        valid = False
    if not valid:
        raise ValueError(f"{file} holds no chat: give a file that mistral-hf chat or save_session wrote.")
    return dict(record)
