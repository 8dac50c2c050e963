"""Trains preferences (DPO with LoRA): the chosen answer to a prompt becomes likelier than the rejected answer.

python examples/finetune_dpo.py --steps 30
python examples/finetune_dpo.py --model mistralai/Mistral-7B-v0.3 --preferences pairs.jsonl --learning-rate 5e-6
"""

import argparse
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

from mistral_hf.bundled import BUNDLED_CHECKPOINT  # importing mistral_hf registers its models


def preferences(path: Path | None) -> Dataset:
    """One pair a line, as ``{"prompt": ..., "chosen": ..., "rejected": ...}``; without a file, a few built-in ones."""
    if path is not None:
        return Dataset.from_json(str(path))
    people = ("the captain", "my aunt", "the old doctor", "her brother", "the king", "a stranger")
    return Dataset.from_list(
        [
            {
                "prompt": f"Suddenly {person} spoke:",
                "chosen": " I am very glad to see you.",
                "rejected": " Go away, all of you!",
            }
            for person in people
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(BUNDLED_CHECKPOINT), help="folder or hub id of a checkpoint")
    parser.add_argument("--preferences", type=Path, help="JSON lines (default: a few built-in pairs)")
    parser.add_argument("--output", type=Path, default=Path("runs/dpo"), help="output folder")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--beta", type=float, default=0.1, help="how strongly the model stays close to the initial one")
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.unk_token
    trainer = DPOTrainer(
        AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32),
        args=DPOConfig(
            output_dir=str(options.output),
            beta=options.beta,
            max_steps=options.steps,
            per_device_train_batch_size=options.batch_size,
            learning_rate=options.learning_rate,
            bf16=torch.accelerator.is_available(),
            gradient_checkpointing=torch.accelerator.is_available(),
            logging_steps=1,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=preferences(options.preferences),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),  # the base is the reference model
    )
    trainer.train()
    trainer.save_model()
    margins = [entry["rewards/margins"] for entry in trainer.state.log_history if "rewards/margins" in entry]
    print(f"margin of the chosen answers: {margins[0]:.3f} -> {margins[-1]:.3f}; adapter: {options.output}")


if __name__ == "__main__":
    main()
