"""What the benchmarks of both ports share: the port beside the two PyTorch versions, and loading without PyTorch.

Legend: B batch, S tokens of a prompt, V vocabulary.
"""

import json
import statistics
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch

from mistral_hf import MistralForCausalLM
from mistral_hf.checkpoints.pretrained import save_folder
from mistral_hf.checkpoints.reader import TensorInfo
from mistral_hf.checkpoints.writer import LazyTensor

from .harness import SUBJECT, TOLERANCES, VERSIONS, AgreementError, Run, check_agreement, environment, interleave, ratio
from .models import TINY, Shape
from .report import finish, make_parser, output_path, read_json, resized, write_json
from .workloads import Generation, ModelCase, Prefill, run_python

LARGE = Shape(28, 2560, 8960, 32, 8, 80, 32000)  # 2.5 billion parameters, 5 GB in bfloat16
GENERATION = Generation(
    name="generation", title="generate 64 tokens after a prompt of 16", group="ports", length=16, tokens=64, repeats=7
)
PROMPT = Prefill(name="prompt", title="prompt of 512 tokens", group="ports", length=512, repeats=5)


class Port(ABC):
    """How a benchmark calls a port.

    Attributes:
        name: Its key in the results.
        model_class: Its causal language model.
        versions: Versions of its packages, by name.
    """

    name: str
    model_class: Any
    versions: Mapping[str, str]

    @abstractmethod
    def generate(self, model: Any, ids: np.ndarray, tokens: int) -> np.ndarray:
        """Continue a prompt ``[B, S]`` greedily, to ``[B, S + tokens]``."""

    @abstractmethod
    def prefill(self, model: Any, batch: int, length: int) -> Callable[[np.ndarray], np.ndarray]:
        """A function from a prompt ``[batch, length]`` to its last logits ``[B, V]``."""

    def prepare(self, model: Any, case: ModelCase) -> Run:
        """A function that does the work of the case once, as the case's own `prepare` gives for PyTorch."""
        ids = case.ids(case.length).numpy()
        if isinstance(case, Generation):
            return lambda: torch.tensor(self.generate(model, ids, case.tokens)[:, case.length :]).long()
        prefill = self.prefill(model, case.batch, case.length)
        return lambda: torch.tensor(prefill(ids))


Part = ModelCase | Callable[[bool], dict[str, Any]]
"""A case to measure beside PyTorch, or a function from ``--tiny`` to the results."""


def main(command: str, doc: str, port: Port, parts: Mapping[str, Part], arguments: Sequence[str] | None) -> None:
    """Measure the parts that the command line `arguments` names; the output keeps its other parts."""
    parser = make_parser(command, doc.splitlines()[0], "--repeats", "--tiny", "--output")
    parser.add_argument("--parts", nargs="+", choices=sorted(parts), default=sorted(parts), help="default: all")
    options = parser.parse_args(arguments)
    output = output_path(options, command)
    results, disagreements = read_json(output), []
    for name in options.parts:
        part = parts[name]
        try:
            result = part(options.tiny) if callable(part) else beside(port, *resized([part], options))
        except AgreementError as error:
            disagreements.append(str(error))
            continue
        print(name, *summary(result), sep="\n  ", flush=True)
        results[name] = {"environment": {**environment(), **port.versions}, **result}
        write_json(output, results)
    finish(output, results, disagreements)


def beside(port: Port, case: ModelCase) -> dict[str, Any]:
    """Interleaved samples of the three versions, their medians, and how many times faster the port is.

    Raises:
        AgreementError: The versions disagree, before or during the samples.
    """
    models = {version: case.load(version, "sdpa") for version in VERSIONS}
    with tempfile.TemporaryDirectory() as folder:
        models[SUBJECT].save_pretrained(folder)
        port_run = port.prepare(port.model_class.from_pretrained(folder), case)
    start = time.perf_counter()
    port_run()
    first = time.perf_counter() - start
    runs = {port.name: port_run, **{version: case.prepare(model, version) for version, model in models.items()}}
    tolerance = TOLERANCES[case.dtype]
    agreement = check_agreement(case.name, {version: run() for version, run in runs.items()}, tolerance)
    seconds, _ = interleave(case.name, runs, case.repeats, tolerance)
    return {
        "settings": case.settings(),
        "seconds": {name: {"median": statistics.median(taken), "samples": taken} for name, taken in seconds.items()},
        "times_faster_than": {version: ratio(seconds[port.name], seconds[version]) for version in VERSIONS},
        "relative_difference": agreement.get(port.name),
        "first_call_seconds": first,
    }


def summary(result: Mapping[str, Any]) -> list[str]:
    """The figures of a part, one line each."""
    lines = [f"{name}: {taken['median'] * 1e3:.1f} ms" for name, taken in result.get("seconds", {}).items()]
    lines += [f"{x['median']:.2f}x {name}" for name, x in result.get("times_faster_than", {}).items()]
    return lines + [f"{k}: {v}" for k, v in result.items() if k not in ("settings", "seconds", "times_faster_than")]


@contextmanager
def checkpoint(tiny: bool) -> Iterator[tuple[Path, int]]:
    """A folder with a bfloat16 checkpoint of repeated random weights in shards, and the weights' bytes."""
    config = (TINY if tiny else LARGE).config()
    pool = np.random.default_rng(0).normal(0, 0.02, 1 << 20).astype(ml_dtypes.bfloat16)
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in MistralForCausalLM(config).state_dict().items()}
    tensors = [
        LazyTensor(name, TensorInfo("bfloat16", shape), partial(np.resize, pool, shape))
        for name, shape in shapes.items()
    ]
    kind = {"architecture": "MistralForCausalLM", "dtype": "bfloat16"}
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "model"
        save_folder(folder, config, None, tensors, **kind, max_shard_size="2GB")
        yield folder, sum(tensor.info.nbytes for tensor in tensors)


LOAD = """
import json, sys, time
from importlib.machinery import PathFinder
find = PathFinder.find_spec
PathFinder.find_spec = staticmethod(lambda name, *rest: None if name.split(".")[0] == "torch" else find(name, *rest))

def memory(field):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field + ":"))

folder, imports, statements = sys.argv[1:]
exec(imports)
before, start = memory("VmRSS"), time.perf_counter()
exec(statements)
seconds = time.perf_counter() - start
print(json.dumps({"seconds": seconds, "bytes_before": before, "peak_bytes": memory("VmHWM")}))
"""


def measure_loading(folder: Path, size: int, imports: str, statements: str) -> dict[str, float]:
    """Load a checkpoint in a fresh process without PyTorch.

    Args:
        folder: The checkpoint, which the code calls ``folder``.
        size: Its bytes.
        imports: Code to run before the measurement.
        statements: Code that loads the model.

    Returns:
        Seconds of the statements, bytes before them, and the peak of the process, also as a multiple of `size`.
    """
    found = json.loads(run_python("-c", LOAD, str(folder), imports, statements).splitlines()[-1])
    return {**found, "peak_over_size": found["peak_bytes"] / size}
