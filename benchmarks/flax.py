"""The JAX port beside the PyTorch model and Transformers' own Mistral: decoding, prompts, compiling, loading.

python -m benchmarks.flax                   # everything, to benchmarks/results/flax.json
python -m benchmarks.flax --parts compile   # one part; its old results are replaced
python -m benchmarks.flax --tiny            # tiny sizes, to check that everything runs
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np

from mistral_hf import FlaxMistralForCausalLM
from mistral_hf.flax.cache import FlaxRollingCache
from mistral_hf.flax.compiled import generation_programs
from mistral_hf.flax.generation import SamplingState
from mistral_hf.generation_options import GenerationOptions

from . import ports
from .harness import Run, in_fresh_process
from .models import TINY, Shape
from .workloads import Decoding, ModelCase

KINDS = {"unrolled": False, "scanned": True}  # the values of `scan_layers`
ROOM = 1 << 20  # new tokens that the benchmark of decoding has room for


class FlaxPort(ports.Port):
    """The JAX port."""

    name = "flax"
    model_class = FlaxMistralForCausalLM
    versions = {"jax": jax.__version__, "flax": flax.__version__}

    def generate(self, model: Any, ids: np.ndarray, tokens: int) -> np.ndarray:
        """Continue a prompt greedily."""
        return np.asarray(model.generate(ids, max_new_tokens=tokens, do_sample=False).sequences)

    def prefill(self, model: Any, batch: int, length: int) -> Callable[[np.ndarray], np.ndarray]:
        """A prompt into a new cache."""

        def forward(ids: np.ndarray) -> np.ndarray:
            cache = model.init_cache(batch, length)
            return np.asarray(model(ids, past_key_values=cache, logits_to_keep=1).logits)[:, -1]

        return forward

    def prepare(self, model: Any, case: ModelCase) -> Run:
        """A function that does the work of the case once; decoding past the window has no result to compare."""
        return decoding(model, case) if isinstance(case, Decoding) else super().prepare(model, case)


def programs_of(model: Any, room: int) -> tuple[Any, Any]:
    """The compiled programs of `generate` for the prompt and for the steps after it, with room for new tokens."""
    programs = generation_programs(model._graph, GenerationOptions(room, 0))
    return programs.prefill, programs.decode


def decoding(model: Any, case: ModelCase) -> Run:
    """The loop of `generate` on a cache of random keys and values; a run continues where the last one ended."""
    _, decode = programs_of(model, ROOM)
    cache, key = model.init_cache(case.batch, case.length), jax.random.key(1)
    keys, values = jax.tree.map(lambda ring: jax.random.normal(key, ring.shape, ring.dtype), (cache.keys, cache.values))
    length = jnp.asarray(case.length, jnp.int32)
    filled = FlaxRollingCache(keys, values, jnp.ones_like(cache.real), length, cache.start)
    tokens = jnp.zeros((case.batch, ROOM), jnp.int32)
    state = SamplingState(jnp.ones((), jnp.int32), tokens, jnp.zeros(case.batch, bool), filled, key, None)

    def run() -> None:
        nonlocal state
        state = jax.block_until_ready(decode(model.params, state, int(state.step) + case.tokens))

    return run


def compiling(tiny: bool) -> dict[str, Any]:
    """Seconds from a call to a compiled program, in fresh processes."""
    shape = TINY if tiny else Shape()
    return {kind: in_fresh_process(compile_seconds, shape, scanned) for kind, scanned in KINDS.items()}


def compile_seconds(shape: Shape, scan_layers: bool) -> dict[str, float]:
    """Tracing and compiling: the forward pass, and the two programs of `generate`, for a prompt of 16 tokens."""
    model = FlaxMistralForCausalLM(shape.config(tie_word_embeddings=True), scan_layers=scan_layers)
    ids = jnp.ones((1, 16), jnp.int32)
    prompt = (model.params, ids, jnp.ones((1, 16), bool), 5, jax.random.key(0))
    prefill, decode = programs_of(model, 64)
    seconds = {}
    start = time.perf_counter()
    jax.jit(lambda params, ids: model(ids, params=params).logits).lower(model.params, ids).compile()
    seconds["forward"] = time.perf_counter() - start
    start = time.perf_counter()
    prefill.lower(*prompt).compile()
    decode.lower(model.params, jax.eval_shape(prefill, *prompt), 5).compile()
    seconds["generate"] = time.perf_counter() - start
    return seconds


def loading(tiny: bool) -> dict[str, Any]:
    """Peak memory and seconds of a fresh process that loads a bfloat16 checkpoint in shards."""
    imports = "import jax\nfrom mistral_hf import FlaxMistralForCausalLM"
    call = "jax.block_until_ready(FlaxMistralForCausalLM.from_pretrained(folder, scan_layers={}).params)"
    with ports.checkpoint(tiny) as (folder, size):
        kinds = {
            kind: ports.measure_loading(folder, size, imports, call.format(scanned)) for kind, scanned in KINDS.items()
        }
    return {"checkpoint_bytes": size, **kinds}


PARTS: dict[str, ports.Part] = {
    "generation": ports.GENERATION,
    "prompt": ports.PROMPT,
    "window": Decoding(name="window", title="decode past W=4096", group="ports", length=4096, tokens=8, repeats=5),
    "compile": compiling,
    "load": loading,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line `arguments`."""
    ports.main("flax", __doc__, FlaxPort(), PARTS, arguments)


if __name__ == "__main__":
    main()
