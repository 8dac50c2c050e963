"""The JAX port beside the PyTorch model and Transformers' own Mistral: decoding, prompts, compiling, loading.

python -m benchmarks.flax                   # everything, to benchmarks/results/flax.json
python -m benchmarks.flax --parts compile   # one part, in place of its old results
python -m benchmarks.flax --tiny            # tiny sizes, to see that everything runs
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import Tensor

from mistral_hf import FlaxMistralForCausalLM, MistralConfig
from mistral_hf.checkpoints.pretrained import save_folder
from mistral_hf.checkpoints.reader import TensorInfo
from mistral_hf.checkpoints.writer import LazyTensor
from mistral_hf.convert.tensors import hf_shapes
from mistral_hf.flax.cache import FlaxRollingCache
from mistral_hf.flax.compiled import generation_programs
from mistral_hf.flax.generation import SamplingState
from mistral_hf.generation_options import GenerationOptions

from .harness import REFERENCE, SUBJECT, Run, environment, in_fresh_process, interleave, ratio, relative_difference
from .harness import write_json as write
from .workloads import TINY, Decoding, Generation, ModelCase, Prefill, Shape

RESULTS = Path(__file__).parent / "results" / "flax.json"
FLAX = "flax"
KINDS = ("unrolled", "scanned")
LARGE = {  # 2.5 billion parameters, 5 GB in bfloat16
    "dim": 2560,
    "hidden_dim": 8960,
    "n_layers": 28,
    "n_heads": 32,
    "n_kv_heads": 8,
    "head_dim": 80,
    "vocab_size": 32000,
    "tied_embeddings": False,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the parts that the command line names."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.flax", description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=sorted(PARTS), default=sorted(PARTS))
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--output", type=Path, default=None, help=f"JSON (default: {RESULTS}; none with --tiny)")
    options = parser.parse_args(arguments)
    output = options.output or (None if options.tiny else RESULTS)
    results = json.loads(output.read_text()) if output and output.exists() else {}
    for part in options.parts:
        result = PARTS[part](options.tiny)
        print(part, *summary(result), sep="\n  ", flush=True)
        results[part] = {"environment": {**environment(), "jax": jax.__version__, "flax": flax.__version__}, **result}
    if output:
        write(output, results)


def summary(result: dict[str, Any]) -> list[str]:
    """The figures of a part, one line each."""
    lines = [f"{name}: {taken['median'] * 1e3:.1f} ms" for name, taken in result.get("seconds", {}).items()]
    lines += [f"{x['median']:.2f}x {name}" for name, x in result.get("times_faster_than", {}).items()]
    return lines + [f"{key}: {value}" for key, value in result.items() if key in KINDS]


def generation(tiny: bool) -> dict[str, Any]:
    """`generate` after a short prompt, one sequence."""
    return beside(Generation(name="g", title="", group="", length=16, tokens=64, repeats=7), tiny, flax_generation)


def prompt(tiny: bool) -> dict[str, Any]:
    """A prompt of 512 tokens through the model."""
    return beside(Prefill(name="p", title="", group="", length=512, repeats=5), tiny, flax_prefill)


def window(tiny: bool) -> dict[str, Any]:
    """Decoding past a full window of 4096."""
    case = Decoding(name="w", title="", group="", length=4096, tokens=8, repeats=5)
    return beside(case, tiny, flax_decoding)


def beside(case: ModelCase, tiny: bool, prepare: Callable[[Any, ModelCase], Run]) -> dict[str, Any]:
    """Interleaved samples of the three versions, their medians, and how many times faster the JAX port is."""
    case = case.tiny() if tiny else case
    models = {version: case.load(version, "sdpa") for version in (SUBJECT, REFERENCE)}
    with tempfile.TemporaryDirectory() as folder:
        models[SUBJECT].save_pretrained(folder)
        twin = FlaxMistralForCausalLM.from_pretrained(folder)
    runs = {FLAX: prepare(twin, case), **{version: case.prepare(model, version) for version, model in models.items()}}
    results = {version: run() for version, run in runs.items()}  # all of them, as decoding goes on where it stopped
    if results[FLAX] is not None:
        relative_difference(case.name, results[FLAX], results[REFERENCE], 1e-4)
    seconds, _ = interleave(case.name, runs, case.repeats, 1e-4)
    return {
        "settings": case.settings(),
        "seconds": {name: {"median": statistics.median(taken), "samples": taken} for name, taken in seconds.items()},
        "times_faster_than": {name: ratio(seconds[FLAX], seconds[name]) for name in (SUBJECT, REFERENCE)},
    }


def flax_generation(model: Any, case: ModelCase) -> Run:
    """As `Generation.prepare`."""
    ids = case.ids(case.length).numpy()

    def run() -> Tensor:
        sequences = model.generate(ids, max_new_tokens=case.tokens, do_sample=False).sequences
        return torch.tensor(np.asarray(sequences)[:, case.length :]).long()

    run()
    return run


def flax_prefill(model: Any, case: ModelCase) -> Run:
    """As `Prefill.prepare`."""
    ids = case.ids(case.length).numpy()

    def run() -> Tensor:
        cache = model.init_cache(case.batch, case.length)
        logits = model(ids, past_key_values=cache, logits_to_keep=1).logits
        return torch.tensor(np.asarray(logits)[:, -1])

    run()
    return run


def flax_decoding(model: Any, case: ModelCase) -> Run:
    """As `Decoding.prepare`, with the loop of `generate` on a cache of random keys and values."""
    programs = generation_programs(model._graph, GenerationOptions(1 << 20, 0))
    cache, key = model.init_cache(case.batch, case.length), jax.random.key(1)
    keys, values = jax.tree.map(lambda ring: jax.random.normal(key, ring.shape, ring.dtype), (cache.keys, cache.values))
    length = jnp.asarray(case.length, jnp.int32)
    filled = FlaxRollingCache(keys, values, jnp.ones_like(cache.real), length, cache.start)
    tokens = jnp.zeros((case.batch, 1 << 20), jnp.int32)
    state = [SamplingState(jnp.ones((), jnp.int32), tokens, jnp.zeros(case.batch, bool), filled, key, None)]

    def run() -> None:
        state[0] = programs.decode(model.params, state[0], int(state[0].step) + case.tokens)
        jax.block_until_ready(state[0])

    run()
    return run


def compiling(tiny: bool) -> dict[str, Any]:
    """Seconds from a call to a compiled program, in fresh processes."""
    shape = TINY if tiny else Shape()
    return {kind: in_fresh_process(compile_seconds, shape, kind == "scanned") for kind in KINDS}


def compile_seconds(shape: Shape, scan_layers: bool) -> dict[str, float]:
    """Tracing and compiling: the forward pass, and the two programs of `generate`, for a prompt of 16 tokens."""
    config = MistralConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        tie_word_embeddings=True,
    )
    model = FlaxMistralForCausalLM(config, scan_layers=scan_layers)
    ids, real = jnp.ones((1, 16), jnp.int32), jnp.ones((1, 16), bool)
    programs, key = generation_programs(model._graph, GenerationOptions(64, 0)), jax.random.key(0)
    seconds = {}
    start = time.perf_counter()
    jax.jit(lambda params, ids: model(ids, params=params).logits).lower(model.params, ids).compile()
    seconds["forward"] = time.perf_counter() - start
    start = time.perf_counter()
    programs.prefill.lower(model.params, ids, real, 5, key).compile()
    state = jax.eval_shape(programs.prefill, model.params, ids, real, 5, key)
    programs.decode.lower(model.params, state, 5).compile()
    seconds["generate"] = time.perf_counter() - start
    return seconds


def loading(tiny: bool) -> dict[str, Any]:
    """Peak memory of a fresh process that loads a bfloat16 checkpoint in shards, and its seconds."""
    sizes = tiny_sizes(LARGE) if tiny else LARGE
    with tempfile.TemporaryDirectory() as folder:
        size = write_checkpoint(Path(folder) / "model", sizes)
        kinds = {kind: in_fresh_process(load, str(Path(folder) / "model"), kind == "scanned") for kind in KINDS}
    return {"checkpoint_bytes": size, **{k: {**v, "peak_over_size": v["peak_bytes"] / size} for k, v in kinds.items()}}


def tiny_sizes(sizes: dict[str, Any]) -> dict[str, Any]:
    """The same architecture, tiny."""
    return {**sizes, "dim": 64, "hidden_dim": 128, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "head_dim": 16}


def write_checkpoint(folder: Path, sizes: dict[str, Any]) -> int:
    """Write a checkpoint of repeated random weights; returns its bytes."""
    pool = np.random.default_rng(0).normal(0, 0.02, 1 << 20).astype(jnp.bfloat16)
    tensors = [
        LazyTensor(name, TensorInfo("bfloat16", shape), lambda shape=shape: np.resize(pool, shape))
        for name, shape in hf_shapes(sizes).items()
    ]
    config = MistralConfig(
        vocab_size=sizes["vocab_size"],
        hidden_size=sizes["dim"],
        intermediate_size=sizes["hidden_dim"],
        num_hidden_layers=sizes["n_layers"],
        num_attention_heads=sizes["n_heads"],
        num_key_value_heads=sizes["n_kv_heads"],
        head_dim=sizes["head_dim"],
    )
    save_folder(
        folder, config, None, tensors, architecture="MistralForCausalLM", dtype="bfloat16", max_shard_size="2GB"
    )
    return sum(tensor.info.nbytes for tensor in tensors)


def load(folder: str, scan_layers: bool) -> dict[str, float]:
    """Load a checkpoint; for a fresh process."""
    start = time.perf_counter()
    model = FlaxMistralForCausalLM.from_pretrained(folder, scan_layers=scan_layers)
    jax.block_until_ready(model.params)
    seconds = time.perf_counter() - start
    status = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:"))
    return {"seconds": seconds, "peak_bytes": peak}


PARTS: dict[str, Callable[[bool], dict[str, Any]]] = {
    "generation": generation,
    "prompt": prompt,
    "window": window,
    "compile": compiling,
    "load": loading,
}


if __name__ == "__main__":
    main()
