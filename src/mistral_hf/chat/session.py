"""A conversation with a model whose history stays in the rolling buffer: only the new turn is read."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from ..torch.cache import RollingCache
from .encoding import encode_conversation

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer


class ChatSession:
    """Messages, and the cache that holds their keys and values.

    Args:
        model: A Mistral model for causal language modelling.
        tokenizer: Its tokenizer, with a chat template.
        system: The system prompt, if any.
        **options: For every call of ``generate``.

    Raises:
        ValueError: The tokenizer has no chat template.

    Attributes:
        messages: The conversation so far, as ``apply_chat_template`` takes it.
        prefilled: Tokens that the last reply had to read, its own not counted.
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
        self._forget()

    def reply(self, text: str, streamer: TextStreamer | None = None) -> str:
        """Answer a message.

        Ctrl-C ends the reply early; what has been said stays in the conversation.

        Args:
            text: The user's message; control tokens in it stay text.
            streamer: Gets the tokens as they come.

        Returns:
            The reply.
        """
        ids = encode_conversation(
            self.tokenizer, [*self.messages, {"role": "user", "content": text}], add_generation_prompt=True
        )
        self._keep_common_prefix(ids)
        self.prefilled = len(ids) - self.cache.get_seq_length()
        inputs = torch.tensor([ids], device=self.model.device)
        with _interruptible() as interrupted:
            output = self.model.generate(
                inputs,
                attention_mask=torch.ones_like(inputs),
                past_key_values=self.cache,
                streamer=streamer,
                stopping_criteria=StoppingCriteriaList([interrupted]),
                **self.options,
            )
        self.cached = output[0, : self.cache.get_seq_length()].tolist()
        answer = str(self.tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True)).strip()
        self.messages += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
        return answer

    def _forget(self) -> None:
        self.cache, self.cached = RollingCache(self.model.config), list[int]()

    def _keep_common_prefix(self, ids: list[int]) -> None:
        """Take back what the cache holds beyond the beginning that it shares with `ids`, or start afresh."""
        pairs = zip(self.cached, ids[:-1], strict=False)
        common = next((i for i, (old, new) in enumerate(pairs) if old != new), min(len(self.cached), len(ids) - 1))
        try:
            self.cache.crop(common - len(self.cached))
        except ValueError:  # too far back for the window
            self._forget()


class _Interrupted(StoppingCriteria):
    """Stops `generate` after the current token, once Ctrl-C was pressed."""

    def __init__(self) -> None:
        self.pressed = False

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self.pressed, device=input_ids.device)


@contextmanager
def _interruptible() -> Iterator[_Interrupted]:
    """Let Ctrl-C set the flag of a stopping criterion, in place of raising."""
    criterion = _Interrupted()

    def press(number: int, frame: Any) -> None:
        criterion.pressed = True

    previous = signal.signal(signal.SIGINT, press)
    try:
        yield criterion
    finally:
        signal.signal(signal.SIGINT, previous)
