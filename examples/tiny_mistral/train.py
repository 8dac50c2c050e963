"""Trains the small Mistral checkpoint that ships with mistral_hf: corpus, tokenizer, model, model card.

    python examples/tiny_mistral/train.py

fetches the corpus, trains for ``--steps`` steps with checkpoints in ``--work-dir`` (run the command again to resume an
interrupted training), and writes the finished folder to ``--output``.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, process_time
from typing import Any

import card
import torch
from corpus import DOCUMENT_SEPARATOR, SourceText, excerpt, load_corpus
from optimizer import MuonAdamW
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from torch.utils.data import Dataset
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import get_last_checkpoint

from mistral_hf import MistralConfig

SPECIAL_TOKENS = ["<unk>", "<s>", "</s>", "<pad>"]
BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]
MAX_POSITIONS = 4096
OUTPUT = Path(__file__).parents[2] / "src/mistral_hf/data/tiny-mistral"
WORK_DIR = Path.home() / ".cache/mistral_hf/tiny-mistral"
SAMPLING = {"do_sample": True, "temperature": 0.7, "top_p": 0.9}  # greedy text of a small model soon repeats itself
PROMPTS = (
    "Once upon a time",
    "It is a truth universally acknowledged, that",
    "The captain looked out over the sea and",
    "My fellow citizens, the state of our Union",
    "In the beginning",
)


def build_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-fallback BPE like Mistral's first: ``<unk>``, ``<s>``, ``</s>``, then ``<pad>`` and 256 bytes.

    Merges never cross a space, a newline, a digit or the edge of a word. Only the training needs a pre-tokenizer for
    this: no learnt merge crosses those edges, and the finished tokenizer has none, like Mistral's. Every text decodes
    to itself, spaces included, unless it contains a special token or a "▁".
    """
    trained = Tokenizer(BPE(byte_fallback=True))
    trained.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trained.pre_tokenizer = pre_tokenizers.Split(Regex(r"▁?\p{L}+|\n+|▁+(?=▁)|▁?[^\p{L}\d\n▁]+|▁|\d"), "isolated")
    trainer = BpeTrainer(
        vocab_size=vocab_size, special_tokens=SPECIAL_TOKENS + BYTE_TOKENS, limit_alphabet=128, show_progress=False
    )
    trained.train_from_iterator(texts, trainer)
    learned = json.loads(trained.to_str())["model"]
    model = BPE(
        learned["vocab"],
        [(left, right) for left, right in learned["merges"]],
        unk_token="<unk>",
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = trained.normalizer
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        padding_side="left",
        add_bos_token=True,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        model_max_length=MAX_POSITIONS,
    )


def pack(texts: Iterable[str], tokenizer: PreTrainedTokenizerFast, length: int) -> torch.Tensor:
    """Concatenate texts, each from ``<s>`` to ``</s>``, and cut them into blocks of token ids ``[blocks, length]``.

    Raises:
        ValueError: The texts do not fill one block.
    """
    ids = [token for text in texts for token in [*tokenizer(text, verbose=False).input_ids, tokenizer.eos_token_id]]
    blocks = len(ids) // length
    if not blocks:
        raise ValueError(f"{len(ids)} tokens do not fill one block of {length}: give more text or a shorter length.")
    return torch.tensor(ids[: blocks * length]).view(blocks, length)


class Blocks(Dataset[dict[str, torch.Tensor]]):
    """Token blocks as the dataset of a Trainer."""

    def __init__(self, blocks: torch.Tensor) -> None:
        self.blocks = blocks

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.blocks[index], "labels": self.blocks[index]}


class Clock(TrainerCallback, ExportableState):
    """Wall-clock and processor seconds of training, summed over interruptions."""

    def __init__(self) -> None:
        self.wall = self.processor = 0.0
        self.last = (0.0, 0.0)

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"wall": self.wall, "processor": self.processor}}

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.last = (monotonic(), process_time())

    def on_step_end(self, *_: Any, **__: Any) -> None:
        now = (monotonic(), process_time())
        self.wall += now[0] - self.last[0]
        self.processor += now[1] - self.last[1]
        self.last = now


@dataclass(frozen=True)
class Settings:
    """Sizes of the model and options of its training; the defaults are those of the bundled checkpoint."""

    steps: int = 2200
    warmup_steps: int = 100
    decay_steps: int = 700
    batch_size: int = 8
    length: int = 512
    learning_rate: float = 3e-3
    seed: int = 1
    compile: bool = True
    vocab_size: int = 4096
    hidden_size: int = 256
    intermediate_size: int = 704
    layers: int = 4
    heads: int = 8
    key_value_heads: int = 2
    window: int = 128

    def config(self) -> MistralConfig:
        return MistralConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.key_value_heads,
            sliding_window=self.window,
            max_position_embeddings=MAX_POSITIONS,
            tie_word_embeddings=True,
            bos_token_id=SPECIAL_TOKENS.index("<s>"),
            eos_token_id=SPECIAL_TOKENS.index("</s>"),
            pad_token_id=SPECIAL_TOKENS.index("<pad>"),
        )


def train(blocks: torch.Tensor, settings: Settings, work_dir: Path) -> tuple[PreTrainedModel, Clock]:
    """Train from random weights, or continue from the last checkpoint of the same run in `work_dir`.

    Before the last ``decay_steps``, the learning rate does not depend on ``steps``. A run that is stopped before them
    can continue with another number of steps, and ends like a run that had this number from the start.

    Returns:
        The model, and the time of its training.

    Raises:
        ValueError: `work_dir` holds a checkpoint beyond ``steps``.
    """
    folder = work_dir / f"batch-{settings.batch_size}-rate-{settings.learning_rate:g}-seed-{settings.seed}"
    last = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    if last is not None and int(last.rsplit("-", 1)[1]) > settings.steps:
        raise ValueError(f"{last} is already beyond {settings.steps} steps: choose more steps or another --work-dir.")
    set_seed(settings.seed)
    model = AutoModelForCausalLM.from_config(settings.config())
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="warmup_stable_decay",
        lr_scheduler_kwargs={"num_decay_steps": settings.decay_steps, "decay_type": "1-sqrt"},
        warmup_steps=settings.warmup_steps,
        max_grad_norm=1.0,
        bf16=True,
        torch_compile=settings.compile,
        use_cpu=not torch.cuda.is_available(),
        logging_steps=max(1, min(50, settings.steps // 4)),
        save_steps=max(1, min(100, settings.steps // 2)),
        save_total_limit=2,
        seed=settings.seed,
        report_to="none",
        restore_callback_states_from_checkpoint=True,
    )
    trainer = Trainer(
        model,
        arguments,
        train_dataset=Blocks(blocks),
        optimizers=(MuonAdamW(model, settings.learning_rate, weight_decay=0.1), None),
        callbacks=[Clock()],
    )
    trainer.train(resume_from_checkpoint=last)
    return model, next(callback for callback in trainer.callback_handler.callbacks if isinstance(callback, Clock))


@torch.inference_mode()
def perplexity(model: PreTrainedModel, blocks: torch.Tensor, batch_size: int = 8) -> float:
    """Exponential of the mean negative log-likelihood of all tokens except the first of each block."""
    losses = [model(input_ids=batch, labels=batch).loss * len(batch) for batch in blocks.split(batch_size)]
    return math.exp(float(sum(losses)) / len(blocks))


@torch.inference_mode()
def sample(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompt: str, seed: int) -> str:
    """The prompt and its continuation of up to 80 tokens."""
    set_seed(seed)
    output = model.generate(**tokenizer(prompt, return_tensors="pt"), **SAMPLING, max_new_tokens=80)
    return str(tokenizer.decode(output[0], skip_special_tokens=True))


def evaluate(folder: Path, held_out: list[str], shipped: list[str], settings: Settings) -> card.Evaluation:
    """Load the finished folder in float32; compute its perplexities and draw samples."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    windowed = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    full = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, sliding_window=None).eval()
    rows = []
    for name, texts, length in (
        ("all held-out documents", held_out, settings.length),
        ("all held-out documents", held_out, 4 * settings.length),
        ("heldout.txt", shipped, settings.length),
    ):
        blocks = pack(texts, tokenizer, length)
        figures = (perplexity(model, blocks, max(1, 4096 // length)) for model in (windowed, full))
        rows.append(card.Row(name, length, blocks.numel(), *figures))
    return card.Evaluation(rows, [sample(windowed, tokenizer, prompt, settings.seed) for prompt in PROMPTS])


def hardware() -> str:
    """A description of the device that the training runs on."""
    if torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    return f"{torch.get_num_threads()} CPU threads ({platform.machine()}, {torch.backends.cpu.get_cpu_capability()})"


def build_checkpoint(corpus: list[SourceText], settings: Settings, output: Path, work_dir: Path) -> None:
    """Train, and write the finished folder: weights in bfloat16, tokenizer, held-out excerpt, model card."""
    documents = [document for text in corpus for document in text.documents]
    training = [document.text for document in documents if not document.held_out]
    held_out = [document.text for document in documents if document.held_out]
    tokenizer = build_tokenizer(training, settings.vocab_size)
    blocks = pack(training, tokenizer, settings.length)
    model, clock = train(blocks, settings, work_dir)

    output.mkdir(parents=True, exist_ok=True)
    model.config.use_cache = True  # the Trainer switched it off
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model.generation_config = GenerationConfig(**SAMPLING, **ids)
    model.to(torch.bfloat16).save_pretrained(output)
    tokenizer.save_pretrained(output)
    shipped = excerpt(corpus, 48_000)
    (output / "heldout.txt").write_text(shipped)
    evaluation = evaluate(output, held_out, shipped.strip().split(DOCUMENT_SEPARATOR), settings)
    run = card.Run(
        parameters=model.num_parameters(),
        tokens=settings.steps * settings.batch_size * settings.length,
        corpus_tokens=blocks.numel(),
        wall=clock.wall,
        processor=clock.processor,
        hardware=hardware(),
    )
    (output / "README.md").write_text(card.render(corpus, settings, run, evaluation))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    default = Settings()
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder of the finished checkpoint")
    parser.add_argument("--work-dir", type=Path, default=WORK_DIR, help="folder of packages and training checkpoints")
    parser.add_argument("--steps", type=int, default=default.steps, help="optimizer steps")
    parser.add_argument("--batch-size", type=int, default=default.batch_size, help="blocks of 512 tokens a step")
    parser.add_argument("--learning-rate", type=float, default=default.learning_rate, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=default.seed)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=default.compile)
    options = vars(parser.parse_args())
    output, work_dir = options.pop("output"), options.pop("work_dir")
    build_checkpoint(load_corpus(work_dir / "packages"), Settings(**options), output, work_dir)


if __name__ == "__main__":
    main()
