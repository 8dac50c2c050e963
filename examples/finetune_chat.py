"""Fine-tunes a model on conversations; only the assistant's words count in the loss.

python examples/finetune_chat.py --steps 30
python examples/finetune_chat.py --model mistralai/Mistral-7B-v0.3 --conversations chats.jsonl --lora
"""

import argparse
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from mistral_hf import get_chat_template
from mistral_hf.bundled import BUNDLED_CHECKPOINT

CAPITALS = {"France": "Paris", "Italy": "Rome", "Spain": "Madrid", "England": "London", "Austria": "Vienna"}


def conversations(path: Path | None) -> Dataset:
    """One ``{"messages": [{"role": ..., "content": ...}, ...]}`` a line; without a file, a few built-in ones."""
    if path is not None:
        return Dataset.from_json(str(path))
    capitals = [
        [
            {"role": "user", "content": f"What is the capital of {country}?"},
            {"role": "assistant", "content": f"The capital of {country} is {capital}."},
        ]
        for country, capital in CAPITALS.items()
    ]
    return Dataset.from_list([{"messages": messages} for messages in capitals])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(BUNDLED_CHECKPOINT), help="folder or hub id of a checkpoint")
    parser.add_argument("--conversations", type=Path, help="JSON lines (default: a few built-in questions and answers)")
    parser.add_argument("--output", type=Path, default=Path("runs/chat"), help="output folder")
    parser.add_argument("--template", default="v3", help="tokenizer version of the chat template to learn")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--lora", action="store_true", help="train an adapter instead of all weights")
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    tokenizer.chat_template = tokenizer.chat_template or get_chat_template(options.template)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.unk_token
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    trainer = SFTTrainer(
        model,
        SFTConfig(
            output_dir=str(options.output),
            assistant_only_loss=True,
            padding_free=True,  # packed without padding; sequences do not attend to each other
            max_length=None,
            max_steps=options.steps,
            per_device_train_batch_size=options.batch_size,
            learning_rate=options.learning_rate,
            bf16=torch.accelerator.is_available(),
            gradient_checkpointing=torch.accelerator.is_available(),
            logging_steps=1,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=conversations(options.conversations),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear") if options.lora else None,
    )
    trainer.train()
    trainer.save_model()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(f"loss: {losses[0]:.3f} -> {losses[-1]:.3f}; saved: {options.output}")

    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = trainer.model.eval().generate(**inputs.to(trainer.model.device), max_new_tokens=20, do_sample=False)
    print(tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip())


if __name__ == "__main__":
    main()
