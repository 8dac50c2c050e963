"""Trains a classifier of whole texts: is a remark friendly or not?

python examples/classify_text.py --steps 40
"""

import argparse
from itertools import product
from pathlib import Path

import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

from mistral_hf.bundled import BUNDLED_CHECKPOINT  # importing mistral_hf registers its models

LABELS = ("unfriendly", "friendly")
SUBJECTS = ("The captain", "My aunt", "Her brother", "The doctor", "The old man", "That girl", "Our host", "The king")
REMARKS = (("was cruel", "had a cold heart", "hated us all"), ("was kind", "had a warm heart", "loved us all"))


def remarks(subjects: tuple[str, ...], tokenizer) -> list[dict]:
    """Texts as ids, with their labels."""
    pairs = product(enumerate(REMARKS), subjects)
    texts = [(f"{subject} {remark}.", label) for (label, kinds), subject in pairs for remark in kinds]
    return [{**tokenizer(text), "labels": label} for text, label in texts]


def accuracy(prediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(BUNDLED_CHECKPOINT), help="folder or hub id of a checkpoint")
    parser.add_argument("--output", type=Path, default=Path("runs/classify_text"), help="output folder")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=12)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.unk_token
    model = AutoModelForSequenceClassification.from_pretrained(
        options.model,
        dtype=torch.float32,
        pad_token_id=tokenizer.pad_token_id,
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
        train_dataset=remarks(SUBJECTS[:-2], tokenizer),
        eval_dataset=remarks(SUBJECTS[-2:], tokenizer),
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=accuracy,
    )
    trainer.train()
    print(f"accuracy on new subjects: {trainer.evaluate()['eval_accuracy']:.2f}")
    trainer.save_model()
    tokenizer.save_pretrained(options.output)


if __name__ == "__main__":
    main()
