"""`mistral-hf chat` in a pseudo-terminal: editing and recalling lines, interrupting a reply, resuming a chat."""

import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from typer.testing import CliRunner

from mistral_hf.cli import app

pexpect: Any = pytest.importorskip("pexpect")
pytestmark = pytest.mark.skipif(os.name == "nt", reason="Windows has no pseudo-terminals of this kind")

LEFT, UP, BACKSPACE, CTRL_C, CTRL_D, ALT_ENTER = "\x1b[D", "\x1b[A", "\x7f", "\x03", "\x04", "\x1b\r"
REPLIED = "tokens/s"
PROMPT = r"\x1b\[\?2004h"  # pasted text is marked while a line is typed
OPTIONS = ("--greedy", "--stats")


@pytest.fixture
def terminal(chat_folder: Path) -> Callable[..., Any]:
    """Starts the command, and waits for the first prompt."""

    def spawn(*options: str) -> Any:
        command = ["-m", "mistral_hf", "chat", "--model", str(chat_folder), *OPTIONS, *options]
        environment = {**os.environ, "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1", "OMP_NUM_THREADS": "1"}
        size = (50, 300)  # no reply is broken into lines
        child = pexpect.spawn(sys.executable, command, env=environment, dimensions=size, encoding="utf-8", timeout=120)
        child.expect("/help shows the commands")
        child.expect(PROMPT)
        return child

    return spawn


def say(child: Any, *keys: str) -> str:
    """Type a line, and return what the terminal showed until the reply was complete."""
    for key in (*keys, "\r"):
        child.send(key)
    child.expect(REPLIED)
    shown = child.before
    child.expect(PROMPT)
    return str(shown)


def ended(child: Any) -> int:
    child.expect(pexpect.EOF)
    child.close()
    return int(child.exitstatus)


def messages(file: Path) -> list[dict[str, str]]:
    with safe_open(file, "pt") as content:
        return list(json.loads(content.metadata()["chat_session"])["messages"])


def words(text: str) -> str:
    """Text of a terminal without its control sequences."""
    return " ".join(re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).split())


def piped(folder: Path, *options: str | Path, stdin: str) -> list[str]:
    arguments = ["chat", "--model", str(folder), "--greedy", "--max-new-tokens", "12", *map(str, options)]
    result = CliRunner().invoke(app, arguments, input=stdin)
    assert result.exit_code == 0, result.output
    return [line.strip() for line in result.stdout.splitlines() if line]


def test_lines_are_edited_and_recalled_and_a_chat_is_resumed_past_the_window(
    terminal: Callable[..., Any], chat_folder: Path, tmp_path: Path
) -> None:
    file, whole = tmp_path / "chat", tmp_path / "whole"
    child = terminal("--max-new-tokens", "12", "--save", str(whole))
    say(child, "Hello thxre", LEFT, LEFT, BACKSPACE, "e")
    shown = say(child, UP, " my friend " + "and captain " * 30)
    say(child, "one", ALT_ENTER, "two")
    child.send(f"/save {file}\r")
    child.expect("Saved 6 messages")
    child.expect(PROMPT)
    say(child, "The sea")
    child.send(CTRL_D)
    assert ended(child) == 0
    saved, unbroken = messages(file), messages(whole)
    said = [message["content"] for message in saved if message["role"] == "user"]
    assert said[0] == "Hello there"
    assert said[1].startswith("Hello there my friend and captain")
    assert said[2] == "one\ntwo"
    assert saved[3]["content"] in words(shown)
    assert unbroken[:-2] == saved
    assert piped(chat_folder, "--load", file, stdin="The sea\n") == [unbroken[-1]["content"]]


def test_ctrl_c_ends_a_reply_without_the_keys_typed_meanwhile(terminal: Callable[..., Any], tmp_path: Path) -> None:
    child = terminal("--max-new-tokens", "4000", "--no-markdown", "--save", str(tmp_path / "chat"))
    child.send("Hello there\r")
    child.expect(r"\w+ \w+ \w+ \w+ ")
    child.send("typed early")
    child.expect(r"\w+ \w+ \w+ \w+ \w+ ")
    child.send(CTRL_C)
    child.expect(REPLIED)
    shown = child.before
    assert "early" not in shown
    assert "^C" not in shown
    child.expect(PROMPT)
    child.send("/retry\r")
    child.expect(r"\w+ \w+ \w+ \w+ ")
    child.send(CTRL_C)
    child.expect(REPLIED)
    child.expect(PROMPT)
    child.send(CTRL_C)
    assert ended(child) == 130
    assert [message["role"] for message in messages(tmp_path / "chat")] == ["user", "assistant"]
