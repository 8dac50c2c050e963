"""The interactive chat: only new tokens are read, replies are those of one-shot generation, and the commands."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, TextStreamer
from typer.testing import CliRunner

from mistral_hf import MistralConfig, MistralForCausalLM
from mistral_hf.chat.encoding import encode_conversation
from mistral_hf.chat.session import ChatSession
from mistral_hf.cli import app
from mistral_hf.convert.tokenizer import convert_tokenizer
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


def one_shot(session: ChatSession) -> str:
    """The reply to the last user message, without a cache from before."""
    ids = torch.tensor([encode_conversation(session.tokenizer, session.messages[:-1], add_generation_prompt=True)])
    output = session.model.generate(ids, attention_mask=torch.ones_like(ids), **GREEDY)
    return session.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).strip()


def test_replies_are_those_of_one_shot_generation(session: ChatSession) -> None:
    for text in ("Hello there", "And what [INST] is </s> that?", "Thanks"):
        answer = session.reply(text)
        assert answer == one_shot(session)
        assert session.messages[-1] == {"role": "assistant", "content": answer}
        assert session.cache.layers[0].slots <= 16


def test_only_the_new_turn_is_read(session: ChatSession, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the reply encodes to the ids that were generated, the next turn reads what came after them."""
    session.reply("Hello there")
    history = [*session.cached]
    tail = [5, 6, 7, 8]
    monkeypatch.setattr("mistral_hf.chat.session.encode_conversation", lambda *args, **kwargs: [*history, *tail])
    session.reply("more")
    assert session.prefilled == len(tail)


def test_a_history_that_changed_is_read_again(session: ChatSession, monkeypatch: pytest.MonkeyPatch) -> None:
    session.reply("Hello there")
    changed = [*(token + 1 for token in session.cached), 9]
    monkeypatch.setattr("mistral_hf.chat.session.encode_conversation", lambda *args, **kwargs: changed)
    session.reply("more")
    assert session.prefilled == len(changed)


def test_ctrl_c_ends_a_reply(session: ChatSession) -> None:
    class Impatient(TextStreamer):
        seen = 0

        def put(self, value: Any) -> None:
            self.seen += 1
            if self.seen == 4:  # the prompt and three tokens
                os.kill(os.getpid(), signal.SIGINT)

        def end(self) -> None:
            pass

    before = signal.getsignal(signal.SIGINT)
    session.reply("Hello there", Impatient(session.tokenizer))
    length = session.cache.get_seq_length()
    prompt = len(encode_conversation(session.tokenizer, session.messages[:1], add_generation_prompt=True))
    assert prompt + 2 <= length <= prompt + 4
    assert signal.getsignal(signal.SIGINT) is before
    session.reply("Go on")


def test_without_a_template_it_says_what_to_do(instruct: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(instruct)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="get_chat_template"):
        ChatSession(MistralForCausalLM.from_pretrained(instruct), tokenizer)


def test_the_command_answers_a_pipe(instruct: Path) -> None:
    lines = "Hello there\n\n/what\n/system Be brief.\nHello there\n/reset\nHello there\n/exit\nnever read\n"
    arguments = ["chat", "--model", str(instruct), "--greedy", "--max-new-tokens", "5"]
    result = CliRunner().invoke(app, arguments, input=lines)
    assert result.exit_code == 0, result.output
    assert "There is no command /what" in result.stderr
    replies = result.stdout.strip().splitlines()
    assert len(replies) == 3
    assert replies[0] != replies[1]
    assert replies[1] == replies[2]  # /reset keeps the system prompt
