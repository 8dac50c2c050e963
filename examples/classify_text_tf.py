"""Fits a classifier on a Mistral checkpoint with Keras: do the words of a passage run forwards or backwards?

python examples/classify_text_tf.py --epochs 3
"""

import argparse
import random

import keras
import tensorflow as tf
from transformers import AutoTokenizer

from mistral_hf import BUNDLED_CHECKPOINT, TFMistralForSequenceClassification

WORDS = 24  # words of a passage


def passages(count: int) -> tuple[list[str], list[int]]:
    """Passages of English text, every other one with its words in reverse, and their labels: 1 for reversed."""
    words = (BUNDLED_CHECKPOINT / "heldout.txt").read_text().split()
    starts = random.sample(range(len(words) - WORDS), count)
    labels = [index % 2 for index in range(count)]
    texts = [words[start : start + WORDS][:: -1 if label else 1] for start, label in zip(starts, labels, strict=True)]
    return [" ".join(text) for text in texts], labels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(BUNDLED_CHECKPOINT), help="folder or hub id of a checkpoint")
    parser.add_argument("--examples", type=int, default=512, help="passages to train on; a quarter as many test it")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    keras.utils.set_random_seed(options.seed)
    model = TFMistralForSequenceClassification.from_pretrained(options.model, num_labels=2)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    texts, labels = passages(options.examples * 5 // 4)
    inputs = tokenizer(texts, padding="max_length", truncation=True, max_length=48, return_tensors="np")
    data = tf.data.Dataset.from_tensor_slices({**inputs, "labels": labels})
    train, test = data.take(options.examples).batch(16), data.skip(options.examples).batch(16)

    model.compile(keras.optimizers.AdamW(6e-4), metrics=["accuracy"])
    model.fit(train, epochs=options.epochs, shuffle=False)
    accuracy = model.evaluate(test, return_dict=True, verbose=0)["accuracy"]
    print(f"accuracy: {accuracy:.0%} on {len(labels) - options.examples} passages")


if __name__ == "__main__":
    main()
