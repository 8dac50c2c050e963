"""Reads a shared prefix once and continues it in several ways, each with a copy of its cache.

python examples/reuse_prefix.py --endings " and the king" " but the child"
"""

import argparse
import copy

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mistral_hf import RollingCache
from mistral_hf.bundled import BUNDLED_CHECKPOINT


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(BUNDLED_CHECKPOINT), help="folder or hub id of a checkpoint")
    parser.add_argument("--prefix", default="The door was open, the lamp was out, and nobody answered. Then")
    parser.add_argument("--endings", nargs="+", default=[" the captain", " a little girl"])
    parser.add_argument("--max-new-tokens", type=int, default=30)
    parser.add_argument("--dtype", default="auto", help="auto is the checkpoint's; float32 avoids rounding differences")
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=options.dtype)
    prefix = tokenizer(options.prefix, return_tensors="pt").input_ids
    cache = RollingCache(model.config)
    with torch.inference_mode():
        model(prefix, cache=cache, logits_to_keep=1)

    for ending in options.endings:
        ids = tokenizer(options.prefix + ending, return_tensors="pt").input_ids
        if not torch.equal(ids[:, : prefix.shape[1]], prefix):
            raise SystemExit(f"{ending!r} changes the tokens of the prefix: begin it with a space.")
        output = model.generate(ids, cache=copy.deepcopy(cache), max_new_tokens=options.max_new_tokens, do_sample=False)
        print(tokenizer.decode(output[0], skip_special_tokens=True))


if __name__ == "__main__":
    main()
