"""The training scripts of examples/ learn their data, on the bundled checkpoint and in seconds."""

import json
import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from mistral_hf.bundled import BUNDLED_CHECKPOINT

for package in ("peft", "trl", "datasets", "matplotlib"):
    pytest.importorskip(package)

EXAMPLES = Path(__file__).parents[2] / "examples"
QUICK = {
    "finetune.py": ("--steps", "6", "--max-length", "64", "--learning-rate", "1e-3"),
    "finetune_lora.py": ("--steps", "10", "--max-length", "64", "--merge"),
    "finetune_chat.py": ("--steps", "12"),
    "finetune_dpo.py": ("--steps", "6"),
    "classify_text.py": ("--steps", "15"),
    "classify_tokens.py": ("--steps", "25"),
    "answer_questions.py": ("--steps", "25"),
}


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., Any]:
    """Runs a script with a temporary output folder and returns its captured output."""

    def run(script: str, *arguments: str, text: bool = False) -> Any:
        options = [*(("--text", str(few_paragraphs(tmp_path))) if text else ()), "--output", str(tmp_path / "output")]
        monkeypatch.setattr(sys, "argv", [script, *QUICK[script], *options, *arguments])
        runpy.run_path(str(EXAMPLES / script), run_name="__main__")
        return capfd.readouterr()

    return run


def few_paragraphs(folder: Path) -> Path:
    """The beginning of the held-out text."""
    path = folder / "text.txt"
    path.write_text("\n\n".join((BUNDLED_CHECKPOINT / "heldout.txt").read_text().split("\n\n")[:12]))
    return path


def numbers(output: str, pattern: str) -> list[float]:
    found = re.search(pattern, output)
    assert found, output
    return [float(number) for number in found.groups()]


def test_full_fine_tuning_shows_a_bar_and_draws_the_loss(run: Callable[..., Any], tmp_path: Path) -> None:
    printed = run("finetune.py", "--save-steps", "4", text=True)
    before, after = numbers(printed.out, r"loss on the text: ([\d.]+) -> ([\d.]+);")
    assert after < before - 0.1
    assert "6/6" in printed.err
    assert (tmp_path / "output/loss.png").read_bytes()[:4] == b"\x89PNG"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "output")
    assert model.config.loss_chunk_size == 512
    assert AutoTokenizer.from_pretrained(tmp_path / "output")("A text.").input_ids
    # The run is repeated from its checkpoint, and ends the same.
    history = json.loads((tmp_path / "output/trainer_state.json").read_text())["log_history"]
    (tmp_path / "output/checkpoint-6").rename(tmp_path / "finished")
    run("finetune.py", "--resume", text=True)
    again = json.loads((tmp_path / "output/trainer_state.json").read_text())["log_history"]
    losses = [[entry["loss"] for entry in entries if "loss" in entry] for entries in (history, again)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.parametrize("four_bits", [False, True], ids=["LoRA", "QLoRA"])
def test_an_adapter_lowers_the_loss_and_merges_into_the_model(
    four_bits: bool, run: Callable[..., Any], tmp_path: Path
) -> None:
    if four_bits:
        pytest.importorskip("bitsandbytes")
    printed = run("finetune_lora.py", *(["--load-in-4bit"] if four_bits else []), text=True)
    before, after = numbers(printed.out, r"loss on the text: ([\d.]+) -> ([\d.]+);")
    assert after < before - 0.05
    assert (tmp_path / "output/adapter_model.safetensors").stat().st_size < 2**21
    ids = torch.randint(5, 4000, (1, 40), generator=torch.Generator().manual_seed(0))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "output/merged")
    assert hasattr(merged, "hf_quantizer") == four_bits
    base = AutoModelForCausalLM.from_pretrained(BUNDLED_CHECKPOINT)
    with torch.no_grad():
        assert (merged(ids).logits - base(ids).logits).abs().max() > 0.5


@pytest.mark.parametrize("lora", [False, True])
def test_chat_tuning_learns_and_saves_a_template_that_masks_the_assistant(
    lora: bool, run: Callable[..., Any], tmp_path: Path
) -> None:
    printed = run("finetune_chat.py", *(["--lora", "--steps", "20"] if lora else []))
    before, after = numbers(printed.out, r"loss: ([\d.]+) -> ([\d.]+);")
    assert after < before / 3
    assert "The capital of France is" in printed.out
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "output")
    messages = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Good day."}]
    encoded = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    assert 0 < sum(encoded["assistant_masks"]) < len(encoded["input_ids"])


def test_chat_tuning_reads_conversations_from_a_file(run: Callable[..., Any], tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Good day to you."}]
    path = tmp_path / "chats.jsonl"
    path.write_text("\n".join([json.dumps({"messages": messages})] * 4))
    before, after = numbers(run("finetune_chat.py", "--conversations", str(path)).out, r"loss: ([\d.]+) -> ([\d.]+);")
    assert after < before / 3


def test_chosen_answers_become_likelier_than_rejected_ones(run: Callable[..., Any], tmp_path: Path) -> None:
    before, after = numbers(run("finetune_dpo.py").out, r"chosen answers: (-?[\d.]+) -> (-?[\d.]+);")
    assert abs(before) < 0.05
    assert after > 0.2
    assert (tmp_path / "output/adapter_config.json").is_file()


def test_a_text_classifier_labels_new_subjects(run: Callable[..., Any], tmp_path: Path) -> None:
    assert numbers(run("classify_text.py").out, r"accuracy on new subjects: ([\d.]+)")[0] >= 0.9
    classify = pipeline("text-classification", model=str(tmp_path / "output"), device="cpu")
    assert [found["label"] for found in classify(["Our host was kind.", "The king was cruel."])] == [
        "friendly",
        "unfriendly",
    ]


def test_a_token_classifier_finds_names_in_new_sentences(run: Callable[..., Any], tmp_path: Path) -> None:
    assert numbers(run("classify_tokens.py").out, r"new sentences: ([\d.]+)")[0] >= 0.9
    classify = pipeline(
        "token-classification", model=str(tmp_path / "output"), aggregation_strategy="simple", device="cpu"
    )
    found = {part["entity_group"] for part in classify("Jane went to Vienna.")}
    assert {"person", "place"} <= found


def test_new_questions_are_answered(run: Callable[..., Any]) -> None:
    assert numbers(run("answer_questions.py").out, r"new questions: ([\d.]+)")[0] >= 0.7
