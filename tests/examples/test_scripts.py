"""The scripts of examples/ do what their docstrings promise."""

import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mistral_hf.bundled import BUNDLED_CHECKPOINT

EXAMPLES = Path(__file__).parents[2] / "examples"
QUICK_TOKENS = ("--max-new-tokens", "8")
QUICK = {
    "generate_text.py": ("--prompt", "In the beginning", *QUICK_TOKENS),
    "reuse_prefix.py": ("--prefix", "He said", "--endings", " that", " no", "--dtype", "float32", *QUICK_TOKENS),
    "stream_long_prompt.py": ("--max-new-tokens", "2"),
}


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a script and returns its output."""

    def run(script: str, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        runpy.run_path(str(EXAMPLES / script), run_name="__main__")
        return capsys.readouterr().out

    return run


def test_every_script_has_a_quick_run() -> None:
    """Here, or in the tests of a script that needs an extra."""
    others = ("examples/test_training.py", "flax/test_environment.py", "tf/test_training.py")
    elsewhere = "".join((Path(__file__).parents[1] / name).read_text(encoding="utf-8") for name in others)
    assert set(QUICK) == {path.name for path in EXAMPLES.glob("*.py") if f'"{path.name}"' not in elsewhere}


@pytest.mark.parametrize("script", sorted(QUICK))
def test_every_script_takes_a_model(run: Callable[..., str], script: str) -> None:
    with pytest.raises((OSError, ValueError), match="nowhere"):
        run(script, "--model", "./nowhere")


def test_generated_text_continues_the_prompt_and_is_set_by_the_seed(run: Callable[..., str]) -> None:
    first, second = (run("generate_text.py", *QUICK["generate_text.py"]) for _ in range(2))
    assert first == second
    assert first.startswith("In the beginning")
    assert len(first) > len("In the beginning\n")


def test_the_cache_of_a_long_prompt_holds_the_window(run: Callable[..., str], tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text((BUNDLED_CHECKPOINT / "heldout.txt").read_text()[:6000])
    output = run("stream_long_prompt.py", "--text", str(text), *QUICK["stream_long_prompt.py"])
    (window,) = map(int, re.findall(r"window: (\d+)", output))
    runs = [tuple(map(int, found)) for found in re.findall(r"prompt: (\d+) tokens; cache: (\d+) bytes", output)]
    assert len(runs) == 3
    assert window < runs[0][0] < runs[1][0] < runs[2][0]
    config = AutoModelForCausalLM.from_pretrained(BUNDLED_CHECKPOINT).config
    expected = (
        2 * config.num_hidden_layers * config.num_key_value_heads * window * config.head_dim * config.dtype.itemsize
    )
    assert {size for _, size in runs} == {expected}


def test_a_reused_prefix_gives_the_text_of_the_whole_prompt(run: Callable[..., str]) -> None:
    lines = run("reuse_prefix.py", *QUICK["reuse_prefix.py"])
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED_CHECKPOINT)
    model = AutoModelForCausalLM.from_pretrained(BUNDLED_CHECKPOINT, dtype=torch.float32)
    for line, prompt in zip(lines.splitlines(), ("He said that", "He said no"), strict=True):
        with torch.inference_mode():
            ids = model.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=8, do_sample=False)
        assert line == tokenizer.decode(ids[0], skip_special_tokens=True)


def test_an_ending_that_changes_the_tokens_of_the_prefix_is_refused(run: Callable[..., str]) -> None:
    with pytest.raises(SystemExit, match="begin it with a space"):
        run("reuse_prefix.py", "--prefix", "the", "--endings", "re")
