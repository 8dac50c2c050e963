"""Fine-tunes all weights on the paragraphs of a text, packed without padding, and draws the loss.

python examples/finetune.py --text my.txt --steps 200
accelerate launch --config_file examples/accelerate/fsdp2.yaml examples/finetune.py --model mistralai/Mistral-7B-v0.1
"""

import argparse
from pathlib import Path

import matplotlib
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorWithFlattening, Trainer, TrainingArguments

from mistral_hf.bundled import BUNDLED_CHECKPOINT  # importing mistral_hf registers its models

matplotlib.use("Agg")
from matplotlib import pyplot as plt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(BUNDLED_CHECKPOINT), help="folder or hub id of a checkpoint")
    parser.add_argument("--text", type=Path, default=BUNDLED_CHECKPOINT / "heldout.txt", help="text file to train on")
    parser.add_argument("--output", type=Path, default=Path("runs/finetune"), help="output folder")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=4, help="paragraphs packed into one sequence")
    parser.add_argument("--max-length", type=int, default=512, help="tokens of a paragraph; longer ones are cut")
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--loss-chunk-size", type=int, default=512, help="tokens whose logits are in memory at a time")
    parser.add_argument("--save-steps", type=int, default=500)
    parser.add_argument("--resume", action="store_true", help="continue from the last checkpoint in the output folder")
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    paragraphs = [text for text in options.text.read_text(encoding="utf-8").split("\n\n") if text.strip()]
    encoded = tokenizer(
        [text + tokenizer.eos_token for text in paragraphs], max_length=options.max_length, truncation=True
    )
    model = AutoModelForCausalLM.from_pretrained(
        options.model, dtype=torch.float32, loss_chunk_size=options.loss_chunk_size
    )
    data = [{"input_ids": ids} for ids in encoded["input_ids"]]
    trainer = Trainer(
        model,
        TrainingArguments(
            output_dir=str(options.output),
            max_steps=options.steps,
            per_device_train_batch_size=options.batch_size,
            learning_rate=options.learning_rate,
            warmup_steps=max(1, options.steps // 20),
            bf16=torch.accelerator.is_available(),  # mixed precision: the weights stay float32
            gradient_checkpointing=torch.accelerator.is_available(),
            logging_steps=1,
            save_steps=options.save_steps,
            report_to="none",
        ),
        train_dataset=data,
        eval_dataset=data,
        data_collator=DataCollatorWithFlattening(),
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train(resume_from_checkpoint=options.resume)
    after = trainer.evaluate()["eval_loss"]
    trainer.save_model()
    trainer.save_state()
    if trainer.is_world_process_zero():
        tokenizer.save_pretrained(options.output)
        losses = [(entry["step"], entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
        plot(losses, options.output / "loss.png")
        print(f"loss on the text: {before:.3f} -> {after:.3f}; saved: {options.output}")


def plot(losses: list[tuple[int, float]], path: Path) -> None:
    """Draw the loss of every step."""
    figure, axes = plt.subplots(figsize=(7, 4))
    axes.plot(*zip(*losses, strict=True))
    axes.set(xlabel="step", ylabel="loss (nats per token)", title="Fine-tuning")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)


if __name__ == "__main__":
    main()
