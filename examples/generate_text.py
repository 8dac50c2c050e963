"""Continues a prompt with a Mistral checkpoint, the bundled one unless `--model` names another.

python examples/generate_text.py --prompt "It was a dark night"
"""

import argparse

from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from mistral_hf.bundled import BUNDLED_CHECKPOINT  # importing mistral_hf registers its models


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(BUNDLED_CHECKPOINT), help="folder or hub id of a checkpoint")
    parser.add_argument("--prompt", default="Once upon a time")
    parser.add_argument("--max-new-tokens", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model)
    set_seed(options.seed)
    output = model.generate(
        **tokenizer(options.prompt, return_tensors="pt"),
        max_new_tokens=options.max_new_tokens,
        do_sample=True,
        temperature=0.7,
        top_p=0.9,
    )
    print(tokenizer.decode(output[0], skip_special_tokens=True))


if __name__ == "__main__":
    main()
