"""Chat sessions: only new tokens are read, replies match one-shot generation, errors leave no trace."""

import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from itertools import count
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, TextStreamer

from mistral_hf import MistralConfig, MistralForCausalLM
from mistral_hf.chat.encoding import encode_conversation
from mistral_hf.chat.session import ChatSession
from mistral_hf.chat.template import get_chat_template
from mistral_hf.convert.tokenizer import convert_tokenizer
from tests.helpers.conversations import quick
from tests.helpers.tokenizer_files import REAL

GREEDY = {"do_sample": False, "max_new_tokens": 12}


@pytest.fixture(scope="module")
def instruct(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model with a real tokenizer of version 3 and its chat template."""
    folder = tmp_path_factory.mktemp("instruct")
    convert_tokenizer(REAL["v3"], folder)
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=32768, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, sliding_window=16, initializer_range=0.5, eos_token_id=None,
    )  # fmt: skip
    MistralForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def session(instruct: Path) -> ChatSession:
    model = MistralForCausalLM.from_pretrained(instruct).eval()
    return ChatSession(model, AutoTokenizer.from_pretrained(instruct), **GREEDY)


def one_shot(session: ChatSession, **options: Any) -> str:
    """The reply to the last user message, without a cache from before."""
    ids = torch.tensor([encode_conversation(session.tokenizer, session.messages[:-1], add_generation_prompt=True)])
    output = session.model.generate(ids, attention_mask=torch.ones_like(ids), **{**GREEDY, **options})
    return session.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).strip()


def test_replies_match_one_shot_generation(session: ChatSession) -> None:
    for text in ("Hello there", "And what [INST] is </s> that?", "Thanks"):
        answer = session.reply(text)
        assert answer == one_shot(session)
        assert session.messages[-1] == {"role": "assistant", "content": answer}
        assert session.memory.cache.layers[0].slots <= 16


def test_only_the_new_turn_is_read(session: ChatSession, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the reply encodes to the ids that were generated, the next turn reads only the tokens after them."""
    session.reply("Hello there")
    history = [*session.memory.ids]
    tail = [5, 6, 7, 8]
    monkeypatch.setattr("mistral_hf.chat.session.encode_conversation", lambda *args, **kwargs: [*history, *tail])
    session.reply("more")
    assert session.prefilled == len(tail)


def test_a_history_that_changed_is_read_again(session: ChatSession, monkeypatch: pytest.MonkeyPatch) -> None:
    session.reply("Hello there")
    changed = [*(token + 1 for token in session.memory.ids), 9]
    monkeypatch.setattr("mistral_hf.chat.session.encode_conversation", lambda *args, **kwargs: changed)
    session.reply("more")
    assert session.prefilled == len(changed)


class Faulty(TextStreamer):
    """Raises in the call of ``put`` with this number, counted from 1, or in ``end`` for 0."""

    def __init__(self, tokenizer: Any, number: int, error: type[BaseException]) -> None:
        super().__init__(tokenizer)
        self.number, self.error, self.calls = number, error, 0

    def put(self, value: torch.Tensor) -> None:
        self.calls += 1
        if self.calls == self.number:
            raise self.error("no reply")

    def end(self) -> None:
        if self.number == 0:
            raise self.error("no end")


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("number", [1, 2, 3, 8, 13, 0])
@pytest.mark.parametrize("history", [[], ["Hello there", "What is it that you see from where you are now, my friend?"]])
def test_the_reply_after_one_that_raised_is_right(
    session: ChatSession, history: list[str], number: int, error: type[BaseException]
) -> None:
    """The error comes at the prompt, at tokens within and past the window of 16, or at the end."""
    for text in history:
        session.reply(text)
    said = [*session.messages]
    with pytest.raises(error):
        session.reply("Tell me something, please", Faulty(session.tokenizer, number, error))
    assert session.messages == said
    assert session.memory.cache.get_seq_length() == len(session.memory.ids)
    for text in ("Tell me something, please", "Thanks"):
        assert session.reply(text) == one_shot(session)


def test_the_reply_after_a_failed_forward_pass_is_right(session: ChatSession, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the second layer raises, the caches of the layers end at different tokens."""
    session.reply("Hello there")
    layer = session.model.model.layers[1]
    with monkeypatch.context() as patch:
        patch.setattr(layer, "forward", lambda *args, **kwargs: torch.zeros(()) + None)
        with pytest.raises(TypeError):
            session.reply("And now?")
    assert session.reply("And now?") == one_shot(session)


def empty_replies(session: ChatSession) -> dict[str, Any]:
    """Options with which the model ends its reply before it begins."""
    return {**session.options, "max_new_tokens": 1, "forced_eos_token_id": 2}


@pytest.mark.parametrize("version", ["v1", "v3", "v7"])
def test_an_empty_reply_takes_its_turn_back(session: ChatSession, version: str) -> None:
    """Every version refuses an answer without text, so it would end the conversation."""
    session.tokenizer.chat_template = get_chat_template(version)
    session.reply("Hello there")
    said, options = [*session.messages], session.options
    session.options = empty_replies(session)
    assert session.reply("And what now?") == ""
    assert session.messages == said
    session.options = options
    assert session.reply("Tell me something") == one_shot(session)
    assert [message["content"] for message in session.messages[::2]] == ["Hello there", "Tell me something"]


@pytest.mark.parametrize(
    "template",
    [
        "{% if messages[0].role == 'system' %}{{ raise_exception('No system prompts.') }}{% endif %}",
        "{{ 1 / 0 }}",
        "{{ messages.x.y }}",
        "{% if %}",
        "{% for i in range(10000000000) %}{% endfor %}",
        "{{ ''.__class__.__mro__ }}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{{ 'x' + 1 }}",
    ],
)
def test_a_template_that_raises_leaves_the_session_as_it_was(session: ChatSession, template: str) -> None:
    session.reset("Be brief.")
    session.reply("Hello there")
    said, memory = [*session.messages], session.memory
    works, session.tokenizer.chat_template = session.tokenizer.chat_template, template
    with pytest.raises(ValueError, match=r"The conversation is refused: .|The chat template fails|nested too deeply"):
        session.reply("And now?")
    assert (session.messages, session.memory) == (said, memory)
    session.tokenizer.chat_template = works
    assert session.reply("And now?") == one_shot(session)


class Interrupted(AbstractContextManager[None]):
    """Raises a KeyboardInterrupt before a line of the session's file, counted from 0 as they are run."""

    def __init__(self, line: int) -> None:
        self.left, self.previous = line, sys.gettrace()

    def __enter__(self) -> None:
        sys.settrace(lambda frame, event, argument: self.trace if frame.f_code.co_filename == SESSION else None)

    def trace(self, frame: FrameType, event: str, argument: Any) -> Any:
        if event == "line":
            self.left -= 1
            if self.left < 0:
                sys.settrace(self.previous)
                raise KeyboardInterrupt
        return self.trace

    def __exit__(self, *error: object) -> None:
        sys.settrace(self.previous)


SESSION = ChatSession.reply.__code__.co_filename
ACTIONS = st.one_of(
    st.just(("reply", 0)),
    st.just(("empty", 0)),
    st.just(("reset", 0)),
    st.tuples(st.sampled_from(["streamer", "interrupted streamer"]), st.integers(0, 13)),
    st.tuples(st.just("line"), st.integers(0, 40)),
    st.tuples(st.just("layer"), st.integers(0, 13)),
)
TEXTS = st.sampled_from(["Hi", "What [INST] is </s> that?", "Tell me what it is that you see from where you are now."])


def raise_in_call(number: int) -> Callable[..., None]:
    """A hook that raises in its call of this number, counted from 0."""
    calls = count()

    def hook(*arguments: Any) -> None:
        if next(calls) == number:
            raise FloatingPointError

    return hook


def act(session: ChatSession, action: str, number: int, text: str) -> None:
    """Do one thing to a session, let it fail if that is what the action is for, and check what must hold after it."""
    said = [*session.messages]
    if action == "reset":
        session.reset(text)
        return
    if action == "empty":
        options, session.options = session.options, empty_replies(session)
        assert session.reply(text) == ""
        session.options = options
    elif action in ("streamer", "interrupted streamer"):
        error = RuntimeError if action == "streamer" else KeyboardInterrupt
        with pytest.raises(error):
            session.reply(text, Faulty(session.tokenizer, number, error))
    elif action == "line":
        with suppress(KeyboardInterrupt), Interrupted(number):
            session.reply(text)
    elif action == "layer":
        hook = session.model.model.layers[1].register_forward_pre_hook(raise_in_call(number))
        with hook, suppress(FloatingPointError):  # the reply may be complete before
            session.reply(text)
    else:
        assert session.reply(text) == one_shot(session)
    assert session.messages[: len(said)] == said
    assert len(session.messages) in (len(said), len(said) + 2)
    assert session.memory.cache.get_seq_length() == len(session.memory.ids)


def check_every_reply(loaded: tuple[Any, Any], data: st.DataObject) -> None:
    session = ChatSession(*loaded, **GREEDY)
    for action, number in data.draw(st.lists(ACTIONS, min_size=1, max_size=6)):
        act(session, action, number, data.draw(TEXTS))
    act(session, "reply", 0, data.draw(TEXTS))


@pytest.fixture(scope="module")
def loaded(instruct: Path) -> tuple[Any, Any]:
    return MistralForCausalLM.from_pretrained(instruct).eval(), AutoTokenizer.from_pretrained(instruct)


@settings(quick, max_examples=25)
@given(data=st.data())
def test_replies_after_any_failures_are_those_of_a_fresh_session(loaded: tuple[Any, Any], data: st.DataObject) -> None:
    check_every_reply(loaded, data)


@pytest.mark.slow
@settings(quick, max_examples=1000)
@given(data=st.data())
def test_replies_after_any_failures_in_a_thousand_sessions_are_those_of_a_fresh_one(
    loaded: tuple[Any, Any], data: st.DataObject
) -> None:
    check_every_reply(loaded, data)


def test_a_session_works_in_any_thread(session: ChatSession) -> None:
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(session.reply, "Hello there").result()
    assert answer == one_shot(session)


def test_stopping_criteria_end_a_reply(session: ChatSession) -> None:
    """The text until then stays in the conversation, and the next reply is right."""
    session.options["stopping_criteria"] = [lambda ids, scores, **kwargs: torch.full((len(ids),), ids.shape[1] > 12)]
    answer = session.reply("Hello there")
    assert session.messages[-1] == {"role": "assistant", "content": answer}
    prompt = encode_conversation(session.tokenizer, session.messages[:1], add_generation_prompt=True)
    assert len(prompt) < session.memory.cache.get_seq_length() == 12
    del session.options["stopping_criteria"]
    assert session.reply("Continue") == one_shot(session)


def fixed_prompt(session: ChatSession, monkeypatch: pytest.MonkeyPatch, ids: list[int], **options: Any) -> str:
    """Make the next messages encode to these ids, and return the reply that one-shot generation gives to them."""
    monkeypatch.setattr("mistral_hf.chat.session.encode_conversation", lambda *args, **kwargs: ids)
    inputs = torch.tensor([ids])
    output = session.model.generate(inputs, attention_mask=torch.ones_like(inputs), **{**GREEDY, **options})
    return session.tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True).strip()


@pytest.mark.parametrize("number", [1, 2, 8, 13, 0])
def test_a_reply_that_raised_past_the_window_is_read_again(
    session: ChatSession, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """The prompt continues the tokens in the cache, so only the failure makes it necessary to read it again."""
    session.reply("Hello there, what is it that you see from where you are now?")
    expected = fixed_prompt(session, monkeypatch, [*session.memory.ids, *range(5, 11)])
    with pytest.raises(RuntimeError):
        session.reply("more", Faulty(session.tokenizer, number, RuntimeError))
    assert session.memory.cache.get_seq_length() == len(session.memory.ids)
    assert session.reply("more") == expected
    assert session.reply("more") == expected


def test_replies_of_a_beam_search_match_one_shot_generation(
    session: ChatSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache of a beam search holds the texts that were continued last, not the reply, so it is not used again."""
    options: dict[str, Any] = {"num_beams": 3, "eos_token_id": list(range(0, 32768, 5)), "pad_token_id": 0}
    session.options |= options
    session.reply("Hello there")
    assert session.messages[-1]["content"] == one_shot(session, **options)
    prompt = encode_conversation(session.tokenizer, session.messages[:1], add_generation_prompt=True)
    inputs = torch.tensor([prompt])
    output = session.model.generate(inputs, attention_mask=torch.ones_like(inputs), **{**GREEDY, **options})
    expected = fixed_prompt(session, monkeypatch, [*output[0].tolist(), 5, 6, 7], **options)
    assert session.reply("more") == expected


def test_a_tokenizer_without_a_template_is_refused_with_the_remedy(instruct: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(instruct)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="get_chat_template"):
        ChatSession(MistralForCausalLM.from_pretrained(instruct), tokenizer)
