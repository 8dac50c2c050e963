"""Trains a model to answer a question with a span of the text that follows it.

python examples/answer_questions.py --steps 80
"""

import argparse
import random
from pathlib import Path

import torch
from transformers import (
    AutoModelForQuestionAnswering,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

from mistral_hf.bundled import BUNDLED_CHECKPOINT  # importing mistral_hf registers its models

PERSONS = ("Anna", "Henry", "Jane", "Thomas", "Mary", "Edward")
PLACES = ("London", "Paris", "Rome", "Bath", "Vienna", "Dublin")


def questions(count: int, tokenizer, seed: int) -> list[dict]:
    """Questions, each followed by a text with its answer, as ids, with the positions of the answer's two ends."""
    draw = random.Random(seed)
    return [question(draw.choice(PERSONS), draw.choice(PLACES), draw.random() < 0.5, tokenizer) for _ in range(count)]


def question(person: str, place: str, where: bool, tokenizer) -> dict:
    asked, answer = (f"Where does {person} live?", place) if where else (f"Who lives in {place}?", person)
    text = f"{asked} {person} lives in {place}, near the sea."
    start = text.index(answer, len(asked))
    encoded = tokenizer(text, return_offsets_mapping=True)
    offsets = encoded.pop("offset_mapping")
    inside = [index for index, (first, last) in enumerate(offsets) if first < start + len(answer) and last > start]
    return {**encoded, "start_positions": inside[0], "end_positions": inside[-1]}


def exact_match(prediction) -> dict[str, float]:
    """Share of answers with both ends right."""
    found = [logits.argmax(-1) for logits in prediction.predictions]
    start, end = (positions == labels for positions, labels in zip(found, prediction.label_ids, strict=True))
    return {"exact_match": float((start & end).mean())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(BUNDLED_CHECKPOINT), help="folder or hub id of a checkpoint")
    parser.add_argument("--output", type=Path, default=Path("runs/answer_questions"), help="output folder")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=12)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.unk_token
    tokenizer.padding_side = "right"  # keeps the positions of an answer in a padded batch
    trainer = Trainer(
        AutoModelForQuestionAnswering.from_pretrained(options.model, dtype=torch.float32),
        TrainingArguments(
            output_dir=str(options.output),
            max_steps=options.steps,
            per_device_train_batch_size=options.batch_size,
            learning_rate=options.learning_rate,
            bf16=torch.accelerator.is_available(),
            logging_steps=1,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=questions(300, tokenizer, seed=0),
        eval_dataset=questions(30, tokenizer, seed=1),
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=exact_match,
    )
    trainer.train()
    print(f"exact matches on new questions: {trainer.evaluate()['eval_exact_match']:.2f}")
    trainer.save_model()
    tokenizer.save_pretrained(options.output)


if __name__ == "__main__":
    main()
