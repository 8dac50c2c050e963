"""Streamers of the commands: plain text, markdown in a terminal, and the times of the tokens."""

from time import perf_counter
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.markdown import Markdown
from transformers import TextStreamer

FENCE = "```"


class TimedStreamer(TextStreamer):
    """Prints text as it is generated, unless `silent`, and keeps the times of the prompt and of every token."""

    def __init__(self, tokenizer: Any, silent: bool = False, skip_prompt: bool = False) -> None:
        super().__init__(tokenizer, skip_prompt=skip_prompt, skip_special_tokens=True)
        self.silent, self.times, self.ended = silent, list[float](), 0.0

    def put(self, value: Any) -> None:
        self.times.append(perf_counter())
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if not self.silent:
            super().on_finalized_text(text, stream_end)

    def end(self) -> None:
        super().end()
        self.ended = perf_counter()

    def close(self) -> None:
        """Leave the terminal as it was, whether the text is complete or not."""


class MarkdownStreamer(TimedStreamer):
    """Renders markdown: the last block again with every word, blocks before it for good."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer, skip_prompt=True)
        self.text = ""
        self.console = Console()
        self.live = Live(
            console=self.console, auto_refresh=False, transient=True, redirect_stdout=False, redirect_stderr=False
        )

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.text += text
        done = len(self.text) if stream_end else complete_blocks(self.text)
        self.live.start()
        if done:
            self.live.update("", refresh=True)
            self.console.print(Markdown(self.text[:done]))
            self.text = self.text[done:]
        if stream_end:
            self.close()
        else:
            self.live.update(Markdown(self.text), refresh=True)

    def close(self) -> None:
        self.live.stop()


def complete_blocks(text: str) -> int:
    """The length of the blocks of markdown that are complete: up to the last empty line outside of fenced code."""
    end = text.rfind("\n\n")
    while end >= 0 and text[:end].count(FENCE) % 2:
        end = text.rfind("\n\n", 0, end)
    return end + 2 if end >= 0 else 0


def statistics(times: list[float], prompt_tokens: int, new_tokens: int) -> dict[str, Any]:
    """Counts and rates; `times` are those of the prompt, of every token and of the end, or only the first and last."""
    seconds = times[-1] - times[0]
    each_token = len(times) > 3
    rate = (new_tokens - 1) / (times[-1] - times[1]) if each_token else new_tokens / seconds
    return {
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "seconds": round(seconds, 4),
        "seconds_to_first_token": round(times[1] - times[0], 4) if each_token else None,
        "tokens_per_second": round(rate, 2),
    }


def summary(numbers: dict[str, Any]) -> str:
    """The line that ``--stats`` shows."""
    first, rate = numbers["seconds_to_first_token"], numbers["tokens_per_second"]
    counts = f"{numbers['prompt_tokens']} tokens read, {numbers['new_tokens']} generated in {numbers['seconds']:.2f} s"
    return f"{counts}{'' if first is None else f', the first after {first:.2f} s'}: {rate:.1f} tokens/s"
