"""``mistral-hf chat``: a conversation in a terminal, or with the lines of a pipe."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .application import ERROR, app, interruptible, say_failure, utf8
from .loading import load
from .options import GenerationOptions, LoadOptions, StatsOption, count, value

if TYPE_CHECKING:
    from ..chat.session import ChatSession

COMMANDS = {
    "/help": "show this",
    "/reset": "begin again, with the same system prompt",
    "/system TEXT": "begin again, with another system prompt or none",
    "/save FILE": "write the conversation and its cache",
    "/load FILE": "continue a conversation from a file",
    "/retry": "ask for another reply to the last message",
    "/exit": "end; so does Ctrl-D",
    "//TEXT": "send a message that begins with /",
}
KEYS = "Alt-Enter begins a new line, the arrows recall earlier ones, Ctrl-C ends a reply."


@app.command()
def chat(
    loading: LoadOptions,
    generation: GenerationOptions,
    model: Annotated[str, value("MODEL", "Folder or hub id of an instruct checkpoint, or of an adapter.")],
    system: Annotated[str | None, value("TEXT", "System prompt.")] = None,
    max_new_tokens: Annotated[int, count("Largest number of tokens in a reply.")] = 500,
    load_file: Annotated[Path | None, value("FILE", "Continue the conversation in this file.", "--load")] = None,
    save_file: Annotated[
        Path | None,
        value("FILE", "Write the conversation and its cache to this file at the end.", "--save"),
    ] = None,
    markdown: Annotated[
        bool | None, typer.Option(help="Render markdown in replies.", show_default="in a terminal")
    ] = None,
    stats: StatsOption = False,
) -> None:
    """Chat in the terminal, or answer the lines of standard input. /help shows the commands."""
    keywords = generation.keywords(max_new_tokens=max_new_tokens)
    system = None if system is None else utf8(system, "--system")
    _check_files(load_file, save_file, system)
    if sys.stdin is None:
        raise typer.BadParameter("Standard input is closed: nothing can be said.", param_hint="standard input")
    loaded, tokenizer = load(model, loading)
    from transformers import set_seed

    from ..chat.saved import load_session, save_session
    from ..chat.session import ChatSession

    if generation.seed is not None:
        set_seed(generation.seed)
    interactive = all(stream is not None and stream.isatty() for stream in (sys.stdin, sys.stdout))
    interrupted = threading.Event()
    try:
        session = ChatSession(loaded, tokenizer, system, stopping_criteria=[_stop_if(interrupted)], **keywords)
        if load_file is not None:
            load_session(session, load_file)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--load" if load_file else "--model") from error
    repl = Repl(session, interrupted, interactive if markdown is None else markdown, stats, interactive)
    if interactive and not loading.quiet:
        _show_banner(model, loaded)
    with interruptible(), _without_echo(interactive):
        try:
            for line in _typed_lines() if interactive else sys.stdin.buffer:
                if not repl.answer(line):
                    break
        finally:
            if save_file is not None:
                save_session(session, save_file)
    if repl.failed and not interactive:
        raise typer.Exit(ERROR)


class Repl:
    """Answers lines: commands, and messages for the model.

    Attributes:
        failed: Whether a line ended in an error.
    """

    def __init__(
        self, session: "ChatSession", interrupted: threading.Event, markdown: bool, stats: bool, interactive: bool
    ) -> None:
        self.session, self.interrupted, self.markdown, self.stats = session, interrupted, markdown, stats
        self.interactive, self.failed = interactive, False

    def answer(self, line: str | bytes) -> bool:
        """Answer a line, and say whether the conversation goes on; an error leaves it as it was."""
        try:
            text = utf8(line, "standard input").strip()
            if text.startswith("/") and not text.startswith("//"):
                return self._run(text)
            if text:
                self._ask(text.removeprefix("/") if text.startswith("//") else text)
        except Exception as error:
            self.failed = True
            say_failure(error)
        return True

    def _run(self, text: str) -> bool:
        name, _, argument = text[1:].partition(" ")
        if name == "exit":
            return False
        command = getattr(self, f"_{name}", None) if any(f"/{name}" == each.split()[0] for each in COMMANDS) else None
        if command is None:
            raise ValueError(f"There is no command /{name}: /help shows them, and //{name} sends it as a message.")
        command(argument.strip())
        return True

    def _help(self, argument: str) -> None:
        width = max(map(len, COMMANDS))
        for usage, meaning in COMMANDS.items():
            self._note(f"  {usage:<{width}}  {meaning}")
        if self.interactive:
            self._note(f"  {KEYS}")

    def _reset(self, argument: str) -> None:
        self.session.reset(self._system_prompt())
        self._say("The conversation begins again.")

    def _system(self, argument: str) -> None:
        self.session.reset(argument or None)
        self._say("The conversation begins again, with this system prompt." if argument else "No system prompt.")

    def _save(self, argument: str) -> None:
        from ..chat.saved import save_session

        save_session(self.session, _file(argument))
        self._say(f"Saved {len(self.session.messages)} messages to {argument}.")

    def _load(self, argument: str) -> None:
        from ..chat.saved import load_session

        load_session(self.session, _file(argument))
        self._say(f"Continuing after {len(self.session.messages)} messages.")

    def _retry(self, argument: str) -> None:
        messages = self.session.messages
        if not messages or messages[-1]["role"] != "assistant":
            raise ValueError("There is no reply yet: write a message.")
        turn = messages[-2:]
        del messages[-2:]
        count = len(messages)
        try:
            self._ask(turn[0]["content"])
        finally:
            if len(messages) == count:  # no other reply
                messages += turn

    def _ask(self, text: str) -> None:
        session = self.session
        streamer = self._streamer()
        with _ctrl_c_sets(self.interrupted):
            try:
                reply = session.reply(text, streamer)
            finally:
                streamer.close()
        if not reply:
            self._note("The reply is empty: your message is taken back.")
        if self.stats:
            from .streaming import statistics, summary

            new_tokens = len(streamer.times) - 1
            self._note(summary(statistics([*streamer.times, streamer.ended], session.prefilled, new_tokens)))

    def _streamer(self) -> Any:
        from .streaming import MarkdownStreamer, TimedStreamer

        tokenizer = self.session.tokenizer
        return MarkdownStreamer(tokenizer) if self.markdown else TimedStreamer(tokenizer, skip_prompt=True)

    def _system_prompt(self) -> str | None:
        first = next(iter(self.session.messages), {})
        return first["content"] if first.get("role") == "system" else None

    def _say(self, text: str) -> None:
        """Confirm a command, to a person."""
        if self.interactive:
            self._note(text)

    def _note(self, text: str) -> None:
        typer.secho(text, err=True, dim=True)


def _file(argument: str) -> Path:
    if not argument:
        raise ValueError("A file is missing: write its name after the command.")
    return Path(argument).expanduser()


def _check_files(load_file: Path | None, save_file: Path | None, system: str | None) -> None:
    """Check before the model is loaded what can be checked."""
    if load_file is not None and system is not None:
        raise typer.BadParameter("It contradicts --system: the file has its own system prompt.", param_hint="--load")
    if load_file is not None and not load_file.is_file():
        raise typer.BadParameter(f"There is no file {load_file}.", param_hint="--load")
    if save_file is not None and (save_file.is_dir() or not os.access(save_file.parent, os.W_OK)):
        raise typer.BadParameter(f"{save_file} cannot be written: name another file.", param_hint="--save")


def _show_banner(name: str, model: Any) -> None:
    window = getattr(model.config, "sliding_window", None)
    typer.secho(name, err=True, bold=True)
    reach = "no window" if window is None else f"window {window}"
    typer.secho(f"{model.device}, {str(model.dtype).removeprefix('torch.')}, {reach}", err=True)
    typer.secho(f"/help shows the commands. {KEYS}", err=True, dim=True)


def _typed_lines() -> Iterator[str]:
    """What the user types: with editing, history, several lines, and the commands by Tab."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import WordCompleter
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

    keys = KeyBindings()

    @keys.add("enter")
    def send(event: KeyPressEvent) -> None:
        event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def begin_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    words = [usage.split()[0] for usage in COMMANDS if not usage.startswith("//")]
    prompts: PromptSession[str] = PromptSession(
        "> ",
        multiline=True,
        prompt_continuation="  ",
        key_bindings=keys,
        completer=WordCompleter(words, sentence=True),
        complete_while_typing=False,
    )
    while True:
        try:
            yield prompts.prompt()
        except EOFError:
            return


def _stop_if(event: threading.Event) -> Callable[..., Any]:
    """A stopping criterion of ``generate`` that ends the text once the event is set."""
    import torch

    def criterion(input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), event.is_set(), device=input_ids.device)

    return criterion


@contextmanager
def _ctrl_c_sets(event: threading.Event) -> Iterator[None]:
    """Within the block, Ctrl-C sets the event, and raises KeyboardInterrupt only when it is set already."""

    def handle(number: int, frame: Any) -> None:
        if event.is_set():
            raise KeyboardInterrupt
        event.set()

    event.clear()
    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


@contextmanager
def _without_echo(interactive: bool) -> Iterator[None]:
    """Within the block, the terminal does not show what is typed; a prompt shows it itself."""
    if not interactive or find_spec("termios") is None:
        yield
        return
    import termios

    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)
    silent = [*before]
    silent[3] &= ~termios.ECHO
    termios.tcsetattr(descriptor, termios.TCSADRAIN, silent)
    try:
        yield
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)
