"""Fine-tunes a Mistral checkpoint in JAX with optax, and saves it for every framework.

python examples/finetune_flax.py --steps 30 --output finetuned
"""

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from tqdm import trange
from transformers import AutoTokenizer

from mistral_hf import BUNDLED_CHECKPOINT, FlaxMistralForCausalLM


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(BUNDLED_CHECKPOINT), help="folder or hub id of the checkpoint")
    parser.add_argument("--text", type=Path, default=BUNDLED_CHECKPOINT / "heldout.txt", help="text file to train on")
    parser.add_argument("--steps", type=int, default=30, help="number of optimizer steps")
    parser.add_argument("--batch", type=int, default=4, help="sequences per step")
    parser.add_argument("--length", type=int, default=128, help="tokens per sequence")
    parser.add_argument("--learning-rate", type=float, default=3e-4, help="peak learning rate")
    parser.add_argument("--output", help="folder to save the checkpoint to")
    options = parser.parse_args()

    model = FlaxMistralForCausalLM.from_pretrained(options.model, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    ids = tokenizer(options.text.read_text(), return_tensors="np", verbose=False).input_ids[0]
    optimizer = optax.adamw(optax.warmup_cosine_decay_schedule(0, options.learning_rate, 5, max(6, options.steps)))
    step, params, state = training_step(model, optimizer), model.params, optimizer.init(model.params)
    progress = trange(options.steps, unit="step")
    for _, batch in zip(progress, batches(ids, options.batch, options.length), strict=False):
        params, state, loss = step(params, state, batch)
        progress.set_postfix(loss=f"{float(loss):.3f}")
    model.params = params
    if options.output:
        model.save_pretrained(options.output)
        tokenizer.save_pretrained(options.output)


def training_step(model: FlaxMistralForCausalLM, optimizer: optax.GradientTransformation) -> Callable[..., Any]:
    """A compiled step: from weights, optimizer state and a batch to new weights, new state and the loss."""

    def step(params: Any, state: Any, batch: Any) -> tuple[Any, Any, jax.Array]:
        loss, gradient = jax.value_and_grad(lambda params: model.loss(batch, params=params))(params)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, loss

    return jax.jit(step, donate_argnums=(0, 1))


def batches(ids: np.ndarray, size: int, length: int, seed: int = 0) -> Iterator[np.ndarray]:
    """Random pieces of a text, ``[size, length]`` ids, without end."""
    if len(ids) <= length:
        raise ValueError(
            f"The text has {len(ids)} tokens, but needs more than {length}: give a longer --text or a smaller --length."
        )
    generator = np.random.default_rng(seed)
    while True:
        starts = generator.integers(len(ids) - length, size=(size, 1))
        yield ids[starts + np.arange(length)]


if __name__ == "__main__":
    main()
