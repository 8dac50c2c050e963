"""Reads prompts much longer than the window in chunks, and shows that the size of the cache does not grow with them.

python examples/stream_long_prompt.py --chunk 256
"""

import argparse
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from mistral_hf import RollingCache
from mistral_hf.bundled import BUNDLED_CHECKPOINT


def bytes_of(cache: RollingCache) -> int:
    """Bytes of the storages of all keys and values, which can be larger than the tensors."""
    tensors = [tensor for layer in cache.layers for tensor in (layer.key_buffer, layer.value_buffer)]
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(BUNDLED_CHECKPOINT), help="folder or hub id of a checkpoint")
    parser.add_argument("--text", type=Path, default=BUNDLED_CHECKPOINT / "heldout.txt", help="a long text to read")
    parser.add_argument("--chunk", type=int, default=256, help="tokens of a chunk")
    parser.add_argument("--max-new-tokens", type=int, default=20)
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model)
    ids = tokenizer(options.text.read_text(encoding="utf-8"), return_tensors="pt", verbose=False).input_ids
    print(f"window: {model.config.sliding_window} tokens; the text: {ids.shape[1]} tokens")
    for length in (ids.shape[1] // 8, ids.shape[1] // 2, ids.shape[1]):
        cache = RollingCache(model.config)
        model.generate(
            ids[:, :length],
            cache=cache,
            prefill_chunk_size=options.chunk,
            max_new_tokens=options.max_new_tokens,
            do_sample=False,
        )
        print(f"prompt: {length} tokens; cache: {bytes_of(cache)} bytes")


if __name__ == "__main__":
    main()
