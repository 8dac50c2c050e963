"""Fine-tunes LoRA adapters on the paragraphs of a text, on top of full or 4-bit weights (QLoRA).

python examples/finetune_lora.py --merge
python examples/finetune_lora.py --model mistralai/Mistral-7B-v0.1 --load-in-4bit --steps 500
"""

import argparse
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    DataCollatorWithFlattening,
    Trainer,
    TrainingArguments,
)

from mistral_hf.bundled import BUNDLED_CHECKPOINT  # importing mistral_hf registers its models


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(BUNDLED_CHECKPOINT), help="folder or hub id of a checkpoint")
    parser.add_argument("--text", type=Path, default=BUNDLED_CHECKPOINT / "heldout.txt", help="text file to train on")
    parser.add_argument("--output", type=Path, default=Path("runs/lora"), help="output folder")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=4, help="paragraphs packed into one sequence")
    parser.add_argument("--max-length", type=int, default=512, help="tokens of a paragraph; longer ones are cut")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--load-in-4bit", action="store_true", help="QLoRA: frozen weights in NF4 (bitsandbytes)")
    parser.add_argument("--merge", action="store_true", help="also save the model with the merged adapter")
    options = parser.parse_args()

    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(
        options.model,
        dtype=torch.bfloat16,
        quantization_config=quantization if options.load_in_4bit else None,
        loss_chunk_size=512,
    )
    if options.load_in_4bit:
        model = prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})
    model = get_peft_model(
        model,
        LoraConfig(r=options.rank, lora_alpha=2 * options.rank, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    model.print_trainable_parameters()

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    paragraphs = [text for text in options.text.read_text(encoding="utf-8").split("\n\n") if text.strip()]
    encoded = tokenizer(
        [text + tokenizer.eos_token for text in paragraphs], max_length=options.max_length, truncation=True
    )
    data = [{"input_ids": ids} for ids in encoded["input_ids"]]
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
        train_dataset=data,
        eval_dataset=data,
        data_collator=DataCollatorWithFlattening(),
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    model.save_pretrained(options.output)
    print(f"loss on the text: {before:.3f} -> {after:.3f}; adapter: {options.output}")
    if options.merge:
        merged = options.output / "merged"
        model.merge_and_unload().save_pretrained(merged)
        tokenizer.save_pretrained(merged)
        print(f"merged: {merged}")


if __name__ == "__main__":
    main()
