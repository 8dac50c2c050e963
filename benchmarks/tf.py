"""The TensorFlow port beside the PyTorch model and Transformers' own Mistral: decoding, prompts, compiling, loading.

python -m benchmarks.tf                # everything, to benchmarks/results/tf.json
python -m benchmarks.tf --parts load   # one part, in place of its old results
python -m benchmarks.tf --tiny         # tiny sizes, to see that everything runs
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import keras
import ml_dtypes
import numpy as np
import tensorflow as tf
import torch
from torch import Tensor

from mistral_hf import MistralConfig, MistralForCausalLM, TFMistralForCausalLM
from mistral_hf.checkpoints.pretrained import save_folder
from mistral_hf.checkpoints.reader import TensorInfo
from mistral_hf.checkpoints.writer import LazyTensor

from .harness import REFERENCE, SUBJECT, Run, environment, interleave, ratio, relative_difference
from .harness import write_json as write
from .workloads import TINY, Generation, ModelCase, Prefill, Shape

RESULTS = Path(__file__).parent / "results" / "tf.json"
PORT = "tensorflow"
LARGE = Shape(28, 2560, 8960, 32, 8, 80, 32000)  # 2.5 billion parameters, 5 GB in bfloat16


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the parts that the command line names."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tf", description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=sorted(PARTS), default=sorted(PARTS))
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--output", type=Path, default=None, help=f"JSON (default: {RESULTS}; none with --tiny)")
    options = parser.parse_args(arguments)
    output = options.output or (None if options.tiny else RESULTS)
    results = json.loads(output.read_text()) if output and output.exists() else {}
    versions = {"tensorflow": tf.__version__, "keras": keras.__version__}
    for part in options.parts:
        result = PARTS[part](options.tiny)
        print(part, *summary(result), sep="\n  ", flush=True)
        results[part] = {"environment": {**environment(), **versions}, **result}
        if output:
            write(output, results)


def summary(result: dict[str, Any]) -> list[str]:
    """The figures of a part, one line each."""
    lines = [f"{name}: {taken['median'] * 1e3:.1f} ms" for name, taken in result.get("seconds", {}).items()]
    lines += [f"{x['median']:.2f}x {name}" for name, x in result.get("times_faster_than", {}).items()]
    return lines + [f"{key}: {value}" for key, value in result.items() if isinstance(value, float | int)]


def generation(tiny: bool) -> dict[str, Any]:
    """`generate` after a short prompt, one sequence."""
    return beside(Generation(name="g", title="", group="", length=16, tokens=64, repeats=7), tiny, port_generation)


def long_generation(tiny: bool) -> dict[str, Any]:
    """`generate` after a prompt of 1024 tokens, which fills the window."""
    case = Generation(name="w", title="", group="", length=1024, window=1024, tokens=32, repeats=5)
    return beside(case, tiny, port_generation)


def prompt(tiny: bool) -> dict[str, Any]:
    """A prompt of 512 tokens through the model, the port's compiled."""
    return beside(Prefill(name="p", title="", group="", length=512, repeats=5), tiny, port_prefill)


def beside(case: ModelCase, tiny: bool, prepare: Callable[[Any, ModelCase], Run]) -> dict[str, Any]:
    """Interleaved samples of the three versions, their medians, and how many times faster the port is."""
    case = case.tiny() if tiny else case
    models = {version: case.load(version, "sdpa") for version in (SUBJECT, REFERENCE)}
    with tempfile.TemporaryDirectory() as folder:
        models[SUBJECT].save_pretrained(folder)
        twin = TFMistralForCausalLM.from_pretrained(folder)
    start = time.perf_counter()
    runs = {PORT: prepare(twin, case)}
    first = time.perf_counter() - start
    runs |= {version: case.prepare(model, version) for version, model in models.items()}
    results = {version: run() for version, run in runs.items()}
    difference = relative_difference(case.name, results[PORT], results[REFERENCE], 1e-4)
    seconds, _ = interleave(case.name, runs, case.repeats, 1e-4)
    return {
        "settings": case.settings(),
        "seconds": {name: {"median": statistics.median(taken), "samples": taken} for name, taken in seconds.items()},
        "times_faster_than": {name: ratio(seconds[PORT], seconds[name]) for name in (SUBJECT, REFERENCE)},
        "relative_difference": difference,
        "first_call_seconds": first,
    }


def port_generation(model: Any, case: ModelCase) -> Run:
    """As `Generation.prepare`."""
    ids = case.ids(case.length).numpy()

    def run() -> Tensor:
        tokens = model.generate(ids, max_new_tokens=case.tokens, do_sample=False)
        return torch.tensor(tokens.numpy()[:, case.length :]).long()

    run()
    return run


def port_prefill(model: Any, case: ModelCase) -> Run:
    """As `Prefill.prepare`."""
    ids = tf.constant(case.ids(case.length).numpy())

    @tf.function(jit_compile=True, autograph=False)
    def forward(ids: Any) -> Any:
        return model(input_ids=ids, cache_capacity=case.length, logits_to_keep=1).logits[:, -1]

    def run() -> Tensor:
        return torch.tensor(forward(ids).numpy())

    run()
    return run


def loading(tiny: bool) -> dict[str, Any]:
    """Peak memory of a fresh process without PyTorch that loads a bfloat16 checkpoint in shards, and its seconds."""
    with tempfile.TemporaryDirectory() as folder:
        size = write_checkpoint(Path(folder) / "model", TINY if tiny else LARGE)
        program = [sys.executable, "-c", LOAD, str(Path(folder) / "model")]
        output = subprocess.run(program, check=True, stdout=subprocess.PIPE, text=True).stdout
    result = json.loads(output.splitlines()[-1])
    return {"checkpoint_bytes": size, **result, "peak_over_size": result["peak_bytes"] / size}


def write_checkpoint(folder: Path, shape: Shape) -> int:
    """Write a checkpoint of repeated random weights; returns its bytes."""
    config = MistralConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
    )
    pool = np.random.default_rng(0).normal(0, 0.02, 1 << 20).astype(ml_dtypes.bfloat16)
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in MistralForCausalLM(config).state_dict().items()}
    tensors = [
        LazyTensor(name, TensorInfo("bfloat16", shape), lambda shape=shape: np.resize(pool, shape))
        for name, shape in shapes.items()
    ]
    save_folder(
        folder, config, None, tensors, architecture="MistralForCausalLM", dtype="bfloat16", max_shard_size="2GB"
    )
    return sum(tensor.info.nbytes for tensor in tensors)


LOAD = """
import json, sys, time
from importlib.machinery import PathFinder
find = PathFinder.find_spec
PathFinder.find_spec = staticmethod(lambda name, *rest: None if name.split(".")[0] == "torch" else find(name, *rest))

def memory(field):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field + ":"))

from mistral_hf import TFMistralForCausalLM
before, start = memory("VmRSS"), time.perf_counter()
model = TFMistralForCausalLM.from_pretrained(sys.argv[1], dtype="bfloat16")
assert model.variable_dtype == "bfloat16"
seconds = time.perf_counter() - start
print(json.dumps({"seconds_to_load": seconds, "bytes_before": before, "peak_bytes": memory("VmHWM")}))
"""


PARTS: dict[str, Callable[[bool], dict[str, Any]]] = {
    "generation": generation,
    "long_generation": long_generation,
    "prompt": prompt,
    "load": loading,
}


if __name__ == "__main__":
    main()
