"""`mistral-hf chat` with the lines of a pipe: commands, errors, saved conversations."""

import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from mistral_hf import BUNDLED_CHECKPOINT
from mistral_hf.chat.encoding import encode_conversation
from mistral_hf.chat.saved import fingerprint, load_session, save_session
from mistral_hf.chat.session import ChatSession
from mistral_hf.cli import app
from mistral_hf.cli.streaming import TimedStreamer, complete_blocks

GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 8}
LONG = "The king and his men came over the sea. " * 14


def chat(folder: Path, *arguments: str | Path, stdin: str | bytes) -> Result:
    options = ["--greedy", "--max-new-tokens", "8"]
    return CliRunner().invoke(app, ["chat", "--model", str(folder), *options, *map(str, arguments)], input=stdin)


def replies(result: Result, code: int = 0) -> list[str]:
    assert result.exit_code == code, result.output
    return [line.strip() for line in result.stdout.strip().splitlines() if line.strip()]


@pytest.fixture
def session(chat_folder: Path) -> ChatSession:
    model = AutoModelForCausalLM.from_pretrained(chat_folder).eval()
    return ChatSession(model, AutoTokenizer.from_pretrained(chat_folder), **GREEDY)


@pytest.fixture
def sessions(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[ChatSession]]:
    """The sessions that commands begin."""
    begun: list[ChatSession] = []
    init = ChatSession.__init__

    def recorded(session: ChatSession, *args: Any, **options: Any) -> None:
        begun.append(session)
        init(session, *args, **options)

    monkeypatch.setattr(ChatSession, "__init__", recorded)
    return begun


def said(session: ChatSession) -> list[str]:
    return [message["content"] for message in session.messages if message["role"] != "assistant"]


def test_the_command_answers_a_pipe(chat_folder: Path) -> None:
    lines = "Hello there\n\n/system Of an old captain.\nHello there\n/reset\nHello there\n/exit\nnever read\n"
    found = replies(chat(chat_folder, stdin=lines))
    assert len(found) == 3
    assert found[0] != found[1] == found[2]  # /reset keeps the system prompt


def test_an_unknown_command_is_named_and_the_chat_goes_on(chat_folder: Path) -> None:
    for line in ("/what", "/ask", "/failed", "/"):  # methods and attributes are no commands
        result = chat(chat_folder, stdin=f"{line}\nHello there\n")
        assert len(replies(result, code=2)) == 1
        assert f"There is no command {line}:" in result.stderr


def test_help_lists_the_commands(chat_folder: Path) -> None:
    result = chat(chat_folder, stdin="/help\n")
    assert result.exit_code == 0
    for command in ("/help", "/reset", "/system TEXT", "/save FILE", "/load FILE", "/retry", "/exit", "//TEXT"):
        assert f"  {command}" in result.stderr


def test_two_slashes_send_a_message_that_begins_with_one(chat_folder: Path, sessions: list[ChatSession]) -> None:
    assert len(replies(chat(chat_folder, stdin="//usr/bin is a folder\n"))) == 1
    assert said(sessions[0]) == ["/usr/bin is a folder"]


def test_retry_asks_again_without_the_last_reply(chat_folder: Path, sessions: list[ChatSession]) -> None:
    found = replies(chat(chat_folder, stdin="Hello there\nThe sea\n/retry\n"))
    assert found[1] == found[2]
    assert said(sessions[0]) == ["Hello there", "The sea"]
    result = chat(chat_folder, stdin="/retry\n")
    assert result.exit_code == 2
    assert "There is no reply yet" in result.stderr


def test_a_failed_retry_keeps_the_reply(
    chat_folder: Path, sessions: list[ChatSession], monkeypatch: pytest.MonkeyPatch
) -> None:
    reply = ChatSession.reply

    def once(session: ChatSession, *args: Any) -> str:
        if calls:
            raise RuntimeError("no memory")
        calls.append(1)
        return reply(session, *args)

    calls: list[int] = []
    monkeypatch.setattr(ChatSession, "reply", once)
    assert chat(chat_folder, stdin="Hello there\n/retry\n").exit_code == 2
    assert [message["role"] for message in sessions[0].messages] == ["user", "assistant"]


def test_an_empty_reply_is_taken_back_and_the_chat_goes_on(
    chat_folder: Path, sessions: list[ChatSession], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ChatSession, "reply", _empty_first(ChatSession.reply))
    result = chat(chat_folder, stdin="Nothing\nHello there\n")
    assert len(replies(result)) == 1
    assert "The reply is empty" in result.stderr
    assert said(sessions[0]) == ["Hello there"]


def _empty_first(reply: Any) -> Any:
    """The method `reply`, whose first answer is a token for the end."""

    def method(session: ChatSession, text: str, streamer: Any) -> str:
        if text == "Nothing":
            session.options["forced_eos_token_id"] = session.tokenizer.eos_token_id
            session.options["max_new_tokens"] = 1
        else:
            session.options["max_new_tokens"] = 8
            session.options.pop("forced_eos_token_id", None)
        return str(reply(session, text, streamer))

    return method


def test_an_error_of_the_template_is_shown_and_the_turn_taken_back(
    chat_folder: Path, sessions: list[ChatSession]
) -> None:
    result = chat(chat_folder, "--system", "refuse", stdin="Hello there\n/system\nHello there\n")
    assert len(replies(result, code=2)) == 1
    assert result.stderr == "Error: The conversation is refused: System prompts are not supported.\n"
    assert said(sessions[0]) == ["Hello there"]
    assert "Traceback" not in result.output


def test_a_line_that_is_not_utf8_is_named_and_the_chat_goes_on(chat_folder: Path) -> None:
    result = chat(chat_folder, stdin=b"\xff\xfe\nHello there\n")
    assert len(replies(result, code=2)) == 1
    assert "It is not UTF-8" in result.stderr


def test_stats_name_the_tokens_read_and_generated(chat_folder: Path) -> None:
    result = chat(chat_folder, "--stats", stdin="Hello there\n")
    assert "8 generated" in result.stderr
    assert "tokens/s" in result.stderr


def test_ctrl_c_ends_a_reply_and_keeps_the_conversation(
    chat_folder: Path, sessions: list[ChatSession], monkeypatch: pytest.MonkeyPatch
) -> None:
    put = TimedStreamer.put

    def impatient(streamer: TimedStreamer, value: torch.Tensor) -> None:
        put(streamer, value)
        if len(streamer.times) == 4:  # the prompt and three tokens
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(TimedStreamer, "put", impatient)
    before = signal.getsignal(signal.SIGINT)
    result = chat(chat_folder, "--max-new-tokens", "99", stdin="Hello there\nContinue\n/exit\n")
    assert result.exit_code == 0, result.output
    assert signal.getsignal(signal.SIGINT) is before
    assert [message["role"] for message in sessions[0].messages] == ["user", "assistant"] * 2
    prompt = len(encode_conversation(sessions[0].tokenizer, sessions[0].messages[:3], add_generation_prompt=True))
    assert prompt + 2 <= sessions[0].memory.cache.get_seq_length() <= prompt + 4


def test_a_second_ctrl_c_leaves(chat_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt that takes long to read cannot be ended after a token."""

    def slow(streamer: TimedStreamer, value: torch.Tensor) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(TimedStreamer, "put", slow)
    assert chat(chat_folder, stdin="Hello there\nContinue\n").exit_code == 130


@pytest.mark.parametrize("text", ["Hello there", LONG])
def test_a_saved_chat_continues_as_without_the_break(
    chat_folder: Path, tmp_path: Path, sessions: list[ChatSession], text: str
) -> None:
    """Also past the window of 128; nothing but the new turn is read."""
    whole = chat(chat_folder, stdin=f"{text}\nWhat did you see?\n")
    first = chat(chat_folder, "--save", tmp_path / "chat", stdin=f"{text}\n")
    second = chat(chat_folder, "--load", tmp_path / "chat", stdin="What did you see?\n")
    assert first.stdout + second.stdout == whole.stdout
    unbroken, _, resumed = sessions
    assert resumed.messages == unbroken.messages
    assert resumed.prefilled == unbroken.prefilled < 40
    assert (resumed.memory.cache.get_seq_length() > 128) is (text is LONG)


def test_save_and_load_are_commands_too(chat_folder: Path, tmp_path: Path, sessions: list[ChatSession]) -> None:
    file = tmp_path / "a"
    lines = f"/system Be brief.\nHello there\n/save {file}\n/reset\nThe sea\n/load {file}\nThe sea\n"
    assert chat(chat_folder, stdin=lines).exit_code == 0
    assert said(sessions[0]) == ["Be brief.", "Hello there", "The sea"]
    result = chat(chat_folder, stdin=f"/save\n/load\n/load {tmp_path}/nothing\nHello\n")
    assert (result.exit_code, result.stderr.count("Error: ")) == (2, 3)


def test_loading_is_refused_before_it_changes_the_session(session: ChatSession, tmp_path: Path) -> None:
    session.reply("Hello there")
    save_session(session, tmp_path / "chat")
    with safe_open(tmp_path / "chat", "pt") as content:
        metadata = content.metadata()
    tensors, record = load_file(tmp_path / "chat"), json.loads(metadata["chat_session"])
    session.reply("The sea")
    kept = [*session.messages], session.memory
    changed = [
        (None, "holds no chat"),
        ("[" * 10_000, "holds no chat"),
        (json.dumps({**record, "messages": [1]}), "holds no chat"),
        (json.dumps({**record, "ids": ["a"]}), "holds no chat"),
        (json.dumps({**record, "model": "0"}), "belongs to another model"),
        (json.dumps({**record, "ids": record["ids"][1:]}), "ids for"),
    ]
    for text, message in changed:
        others = {name: value for name, value in metadata.items() if name != "chat_session"}
        save_file(tensors, tmp_path / "chat", metadata={**others, **({} if text is None else {"chat_session": text})})
        with pytest.raises(ValueError, match=message):
            load_session(session, tmp_path / "chat")
        assert (session.messages, session.memory) == kept


def test_the_fingerprint_changes_with_every_weight_and_field(session: ChatSession) -> None:
    model, first = session.model, fingerprint(session.model)
    assert fingerprint(AutoModelForCausalLM.from_pretrained(model.name_or_path)) == first
    assert fingerprint(AutoModelForCausalLM.from_pretrained(model.name_or_path, dtype=torch.float32)) != first
    model.config.sliding_window = 64
    assert fingerprint(model) != first
    model.config.sliding_window = 128
    assert fingerprint(model) == first
    with torch.no_grad():
        model.model.norm.weight.mul_(2)
    assert fingerprint(model) != first


@pytest.mark.parametrize("field", ["sliding_window", "rms_norm_eps"])
def test_a_chat_of_another_model_or_window_is_refused(chat_folder: Path, tmp_path: Path, field: str) -> None:
    chat(chat_folder, "--save", tmp_path / "chat", stdin="Hello there\n")
    other = Path(shutil.copytree(chat_folder, tmp_path / "other"))
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(
        json.dumps({**config, field: {"sliding_window": 64, "rms_norm_eps": 0.1}[field]})
    )
    result = chat(other, "--load", tmp_path / "chat", stdin="The sea\n")
    assert (result.exit_code, result.stdout) == (2, "")
    assert {"sliding_window": "sliding_window=128", "rms_norm_eps": "another model"}[field] in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--load", "nowhere"), "There is no file nowhere"),
        (("--load", __file__, "--system", "x"), "It contradicts --system"),
        (("--load", __file__), "no complete safetensors file"),
        (("--save", "no/folder/x"), "cannot be written"),
        (("--save", "."), "cannot be written"),
        (("--temperature", "0"), "--temperature"),
    ],
)
def test_bad_options_are_one_line(chat_folder: Path, arguments: tuple[str, ...], message: str) -> None:
    result = chat(chat_folder, *arguments, stdin="")
    assert result.exit_code == 2
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_checkpoint_without_a_template_is_refused() -> None:
    result = chat(BUNDLED_CHECKPOINT, stdin="Hello\n")
    assert result.exit_code == 2
    assert "chat template" in result.stderr


def test_complete_blocks_of_markdown_end_outside_of_fences() -> None:
    assert complete_blocks("one\n\ntwo") == 5
    assert complete_blocks("one") == 0
    assert complete_blocks("one\n\n```\na\n\nb") == 5
    assert complete_blocks("```\na\n\nb\n```\n\nc") == len("```\na\n\nb\n```\n\n")
