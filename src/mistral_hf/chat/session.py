"""A conversation with a model whose history stays in the rolling buffer, so that only the new turn is read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from ..torch.cache import RollingCache
from .encoding import encode_conversation

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer


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
        cache: Keys and values of the conversation.
        cached: Ids of the tokens that the cache holds.
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
        self._empty_cache()

    def reply(self, text: str, streamer: TextStreamer | None = None) -> str:
        """Answer a message.

        If ``generate`` or the streamer raises, the conversation stays as it was, and the next call reads it again.

        Args:
            text: The user's message; control tokens in it stay text.
            streamer: Receives the tokens as they are generated.

        Returns:
            The reply.
        """
        ids = encode_conversation(
            self.tokenizer, [*self.messages, {"role": "user", "content": text}], add_generation_prompt=True
        )
        try:
            self._keep_common_prefix(ids)
            self.prefilled = len(ids) - self.cache.get_seq_length()
            inputs = torch.tensor([ids], device=self.model.device)
            output = self.model.generate(
                inputs,
                attention_mask=torch.ones_like(inputs),
                past_key_values=self.cache,
                streamer=streamer,
                **self.options,
            )
            answer = str(self.tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True)).strip()
            self.cached = output[0, : self.cache.get_seq_length()].tolist()
        except BaseException:  # the cache may hold tokens that are in no record
            self._empty_cache()
            raise
        if self.cache.layers[0].keys.shape[0] > 1:  # beams: their rows need not hold the reply
            self._empty_cache()
        self.messages += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
        return answer

    def _empty_cache(self) -> None:
        self.cache, self.cached = RollingCache(self.model.config), list[int]()

    def _keep_common_prefix(self, ids: list[int]) -> None:
        """Remove from the cache what follows the beginning that it shares with `ids`, or empty it."""
        pairs = zip(self.cached, ids[:-1], strict=False)
        common = next((i for i, (old, new) in enumerate(pairs) if old != new), min(len(self.cached), len(ids) - 1))
        try:
            self.cache.crop(common - len(self.cached))
        except ValueError:  # too far back for the window
            self._empty_cache()
