"""A conversation with a model whose history stays in the rolling buffer, so that only the new turn is read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ..torch.cache import RollingCache
from .encoding import encode_conversation

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer


class Memory(NamedTuple):
    """What a session has read. It is replaced as a whole, so its parts cannot be of different replies.

    Attributes:
        cache: Keys and values.
        ids: Ids of the tokens that the cache holds.
    """

    cache: RollingCache
    ids: list[int]


class ChatSession:
    """Messages, and the cache that holds their keys and values.

    It works in any thread, in one at a time.

    Args:
        model: A Mistral model for causal language modelling.
        tokenizer: Its tokenizer, with a chat template.
        system: The system prompt, if any.
        **options: For every call of ``generate``, such as ``max_new_tokens`` or ``stopping_criteria``.

    Raises:
        ValueError: The tokenizer has no chat template.

    Attributes:
        messages: The conversation so far, as ``apply_chat_template`` takes it.
        options: The options of ``generate``.
        memory: The cache of the conversation, and which tokens it holds.
        prefilled: Number of tokens that were read for the last reply, without the reply itself.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, system: str | None = None, **options: Any
    ) -> None:
        if tokenizer.chat_template is None:
            raise ValueError(
                f"The tokenizer of {tokenizer.name_or_path} has no chat template: use an instruct checkpoint, or set"
                " tokenizer.chat_template = mistral_hf.get_chat_template(version)."
            )
        self.model, self.tokenizer, self.options = model, tokenizer, options
        self.reset(system)

    def reset(self, system: str | None = None) -> None:
        """Begin a new conversation."""
        self.messages: list[Mapping[str, Any]] = [] if system is None else [{"role": "system", "content": system}]
        self.prefilled = 0
        self.memory = self._nothing()

    def reply(self, text: str, streamer: TextStreamer | None = None) -> str:
        """Answer a message.

        If anything raises (the template, ``generate``, the streamer, Ctrl-C), or if the reply is empty, the
        conversation stays as it was: templates refuse an empty answer, and many refuse two messages of the user in a
        row.

        Args:
            text: The user's message; control tokens in it stay text.
            streamer: Receives the tokens as they are generated.

        Returns:
            The reply.

        Raises:
            ValueError: The conversation cannot be encoded, for example because the template refuses it.
        """
        question = {"role": "user", "content": text}
        ids = encode_conversation(self.tokenizer, [*self.messages, question], add_generation_prompt=True)
        # Until the reply is complete, the cache may hold tokens that are in no record: nothing refers to it.
        memory, self.memory = self.memory, self._nothing()
        cache = self._common_prefix(memory, ids)
        self.prefilled = len(ids) - cache.get_seq_length()
        inputs = torch.tensor([ids], device=self.model.device)
        output = self.model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            past_key_values=cache,
            streamer=streamer,
            **self.options,
        )
        answer = str(self.tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True)).strip()
        if cache.layers[0].keys.shape[0] == 1:  # rows of several beams need not hold the reply
            self.memory = Memory(cache, output[0, : cache.get_seq_length()].tolist())
        if answer:
            self.messages += [question, {"role": "assistant", "content": answer}]
        return answer

    def _nothing(self) -> Memory:
        return Memory(RollingCache(self.model.config), [])

    def _common_prefix(self, memory: Memory, ids: list[int]) -> RollingCache:
        """The cache without what follows the beginning that it shares with `ids`, or an empty one."""
        pairs = zip(memory.ids, ids[:-1], strict=False)
        common = next((i for i, (old, new) in enumerate(pairs) if old != new), min(len(memory.ids), len(ids) - 1))
        try:
            memory.cache.crop(common - len(memory.ids))
        except ValueError:  # too far back for the window
            return self._nothing().cache
        return memory.cache
