"""The TensorFlow port beside the PyTorch model and Transformers' own Mistral: decoding, prompts, compiling, loading.

python -m benchmarks.tf                # everything, to benchmarks/results/tf.json
python -m benchmarks.tf --parts load   # one part; its old results are replaced
python -m benchmarks.tf --tiny         # tiny sizes, to check that everything runs
"""

from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from mistral_hf import TFMistralForCausalLM

from . import ports
from .workloads import Generation


class TFPort(ports.Port):
    """The TensorFlow port."""

    name = "tensorflow"
    model_class = TFMistralForCausalLM
    versions = {"tensorflow": tf.__version__, "keras": keras.__version__}

    def generate(self, model: Any, ids: np.ndarray, tokens: int) -> np.ndarray:
        """Continue a prompt greedily."""
        return model.generate(ids, max_new_tokens=tokens, do_sample=False).numpy()

    def prefill(self, model: Any, batch: int, length: int) -> Callable[[np.ndarray], np.ndarray]:
        """A prompt into a new cache, compiled."""

        @tf.function(jit_compile=True, autograph=False)
        def forward(ids: Any) -> Any:
            return model(input_ids=ids, cache_capacity=length, logits_to_keep=1).logits[:, -1]

        return lambda ids: forward(tf.constant(ids)).numpy()


def loading(tiny: bool) -> dict[str, Any]:
    """Peak memory and seconds of a fresh process that loads a bfloat16 checkpoint in shards."""
    statements = """
model = TFMistralForCausalLM.from_pretrained(folder, dtype="bfloat16")
assert model.variable_dtype == "bfloat16"
"""
    with ports.checkpoint(tiny) as (folder, size):
        found = ports.measure_loading(folder, size, "from mistral_hf import TFMistralForCausalLM", statements)
    return {"checkpoint_bytes": size, "seconds_to_load": found.pop("seconds"), **found}


PARTS: dict[str, ports.Part] = {
    "generation": ports.GENERATION,
    "long_generation": Generation(
        name="long_generation",
        title="generate 32 tokens after a prompt of 1024, W=1024",
        group="ports",
        length=1024,
        window=1024,
        tokens=32,
        repeats=5,
    ),
    "prompt": ports.PROMPT,
    "load": loading,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line `arguments`."""
    ports.main("tf", __doc__, TFPort(), PARTS, arguments)


if __name__ == "__main__":
    main()
