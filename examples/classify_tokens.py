"""Trains a classifier of tokens: which words of a sentence name a person or a place?

python examples/classify_tokens.py --steps 60
"""

import argparse
import random
from pathlib import Path

import torch
from transformers import (
    AutoModelForTokenClassification,
    AutoTokenizer,
    DataCollatorForTokenClassification,
    Trainer,
    TrainingArguments,
)

from mistral_hf.bundled import BUNDLED_CHECKPOINT  # importing mistral_hf registers its models

LABELS = ("other", "person", "place")
PERSONS = ("Anna", "Henry", "Jane", "Thomas", "Mary", "Edward")
PLACES = ("London", "Paris", "Rome", "Bath", "Vienna", "Dublin")
SENTENCES = ("{person} went to {place}.", "In {place} he met {person}.", "We saw {person} near {place} again.")


def sentences(count: int, tokenizer, seed: int) -> list[dict]:
    """Sentences as ids, every token with the label of its name, or of no name."""
    draw = random.Random(seed)
    return [
        labelled(draw.choice(SENTENCES), draw.choice(PERSONS), draw.choice(PLACES), tokenizer) for _ in range(count)
    ]


def labelled(sentence: str, person: str, place: str, tokenizer) -> dict:
    text = sentence.format(person=person, place=place)
    spans = [(text.index(name), text.index(name) + len(name), label) for label, name in ((1, person), (2, place))]
    encoded = tokenizer(text, return_offsets_mapping=True)
    labels = []
    for start, end in encoded.pop("offset_mapping"):
        if start == end:  # a special token
            labels.append(-100)
        else:
            labels.append(next((label for first, last, label in spans if start < last and end > first), 0))
    return {**encoded, "labels": labels}


def accuracy(prediction) -> dict[str, float]:
    """Share of the tokens in names that get their label."""
    names = prediction.label_ids > 0
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids)[names].mean())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(BUNDLED_CHECKPOINT), help="folder or hub id of a checkpoint")
    parser.add_argument("--output", type=Path, default=Path("runs/classify_tokens"), help="output folder")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=12)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.unk_token
    model = AutoModelForTokenClassification.from_pretrained(
        options.model,
        dtype=torch.float32,
        id2label=dict(enumerate(LABELS)),
        label2id={label: number for number, label in enumerate(LABELS)},
    )
    trainer = Trainer(
        model,
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
        train_dataset=sentences(200, tokenizer, seed=0),
        eval_dataset=sentences(20, tokenizer, seed=1),
        data_collator=DataCollatorForTokenClassification(tokenizer),
        compute_metrics=accuracy,
    )
    trainer.train()
    print(f"accuracy on the names of new sentences: {trainer.evaluate()['eval_accuracy']:.2f}")
    trainer.save_model()
    tokenizer.save_pretrained(options.output)


if __name__ == "__main__":
    main()
