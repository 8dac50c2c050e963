"""How a case is measured: interleaved samples, checked results, machine limits, peak memory, JSON."""

import gc
import json
import os
import platform
import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy
import torch
import transformers
from torch import Tensor

import mistral_hf

SUBJECT, REFERENCE = "mistral_hf", "reference"
VERSIONS = (SUBJECT, REFERENCE)
# How far the results may be apart, as a share of the reference's (Euclidean norms). In bfloat16 the reference itself is
# 3.9% from its float32 logits at 30 layers and 4.2% from its own eager attention, and mistral_hf 4.1% from float32.
TOLERANCES = {"float32": 1e-4, "bfloat16": 8e-2}

Run = Callable[[], Tensor | None]


class AgreementError(RuntimeError):
    """The two versions computed different results, so that their times cannot be compared."""


@dataclass(frozen=True)
class Cost:
    """What one sample of a case must do at least, whoever does it.

    Attributes:
        items: Units of work, of which `unit` is the name.
        bytes_moved: Bytes of weights, keys and values that have to be read.
        operations: Multiplications and additions of the matrix products.
        dtype: Name of the dtype that they are done in.
    """

    items: int
    unit: str
    bytes_moved: float
    operations: float
    dtype: str = "float32"


@dataclass(frozen=True, kw_only=True)
class Case(ABC):
    """One thing to measure. `load` comes before the baseline of the peak memory, `prepare` and the run after it.

    Attributes:
        name: What the command line calls it.
        title: What it is, in a few words.
        group: Name of the cases that are usually run together.
        repeats: Samples of each version.
        peak_memory: Whether to measure that too.
    """

    name: str
    title: str
    group: str
    repeats: int = 5
    peak_memory: bool = False

    @abstractmethod
    def tiny(self) -> "Case":
        """The same case in the smallest sizes, to see that it runs."""

    @abstractmethod
    def with_layers(self, layers: int) -> "Case":
        """The same case with a model of that many layers."""

    @abstractmethod
    def load(self, version: str, attention: str) -> Any:
        """The model, or what else there is before the work begins."""

    @abstractmethod
    def prepare(self, loaded: Any, version: str) -> Run:
        """A warmed-up function that does the work once and returns what both versions must agree on."""

    @abstractmethod
    def cost(self) -> Cost:
        """The least work of one run."""

    def settings(self) -> dict[str, Any]:
        """Every field but the names."""
        return {key: value for key, value in asdict(self).items() if key not in ("name", "title", "group")}

    def details(self) -> dict[str, Any]:
        """Further findings about the subject."""
        return {}


@dataclass(frozen=True)
class Limits:
    """What the machine can do, the best of several trials: bandwidths in bytes/s, matrix rates in operations/s."""

    copy_bandwidth: float
    read_bandwidth: float
    matrix_rate: dict[str, float]

    def least_seconds(self, cost: Cost) -> tuple[float, str]:
        """The time that no implementation can beat here, and which resource sets it."""
        moving = cost.bytes_moved / max(self.copy_bandwidth, self.read_bandwidth)
        computing = cost.operations / self.matrix_rate[cost.dtype]
        return max((moving, "bytes moved"), (computing, "operations"))


def measure_limits(megabytes: int = 512, order: int = 2048, trials: int = 7) -> Limits:
    """Measure copies and sums of tensors of that many megabytes, and square matrix products of that order.

    The rates are the best of those of PyTorch's two libraries, MKL and oneDNN.
    """
    source = torch.ones(megabytes * 2**18)
    target = torch.empty_like(source)
    rates = {}
    for dtype in TOLERANCES:
        a, b = torch.randn(2, order, order).to(getattr(torch, dtype)).unbind()
        routes = (torch.matmul, _by_onednn)
        rates[dtype] = 2 * order**3 / min(_best_seconds(partial(route, a, b), trials) for route in routes)
    return Limits(
        copy_bandwidth=2 * source.nbytes / _best_seconds(lambda: target.copy_(source), trials),
        read_bandwidth=source.nbytes / _best_seconds(source.sum, trials),
        matrix_rate=rates,
    )


def _by_onednn(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")


def _best_seconds(work: Callable[[], Any], trials: int) -> float:
    work()
    return min(_seconds(work)[0] for _ in range(trials))


def _seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def environment() -> dict[str, Any]:
    """The machine and the software, without anything that identifies a host or a user."""
    cpu = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.exists():
        models = [line for line in information.read_text().splitlines() if line.startswith("model name")]
        cpu = models[0].split(":", 1)[1].strip() if models else cpu
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "cpu": cpu,
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "load_average_before": round(os.getloadavg()[0], 2),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "mistral_hf": mistral_hf.__version__,
    }


def measure(
    case: Case, limits: Limits, attention: str, repeats: int | None = None, memory: bool = True
) -> dict[str, Any]:
    """Measure a case with both versions.

    Args:
        case: What to measure.
        limits: What the machine can do.
        attention: Attention implementation of both versions.
        repeats: Samples of each version (default: the case's own number).
        memory: Measure the peak memory too, if the case is made for that.

    Returns:
        The record of the case, ready for JSON: times in seconds, memory in bytes.

    Raises:
        AgreementError: The versions disagree.
    """
    runs = {version: case.prepare(case.load(version, attention), version) for version in VERSIONS}
    cost = case.cost()
    seconds, difference = interleave(case.name, runs, repeats or case.repeats, TOLERANCES[cost.dtype])
    runs.clear()
    gc.collect()
    least, bound_by = limits.least_seconds(cost)
    record: dict[str, Any] = {
        "name": case.name,
        "title": case.title,
        "group": case.group,
        "settings": case.settings(),
        "versions": {version: _time_record(seconds[version], cost, least) for version in VERSIONS},
        "speedup": ratio(seconds[SUBJECT], seconds[REFERENCE]),
        "limit": {"seconds": least, "bound_by": bound_by, **asdict(cost)},
        "largest_relative_difference": difference,
        "details": case.details(),
    }
    if memory and case.peak_memory:
        peaks = {version: in_fresh_process(peak_memory, case, version, attention) for version in VERSIONS}
        for version, peak in peaks.items():
            record["versions"][version]["peak_memory_bytes"] = peak
        record["memory_ratio"] = peaks[REFERENCE] / peaks[SUBJECT]
    return record


def interleave(
    name: str, runs: Mapping[str, Run], repeats: int, tolerance: float
) -> tuple[dict[str, list[float]], float | None]:
    """Run both versions in turn, so that drifts of the machine meet both, and compare every pair of results.

    Returns:
        Seconds of every run by version, and the largest relative difference between the results, if there are any.
    """
    seconds: dict[str, list[float]] = {version: [] for version in runs}
    differences = []
    gc.collect()
    gc.freeze()  # from here on, collecting garbage takes no time worth mentioning
    try:
        for _ in range(repeats):
            results = {}
            for version, run in runs.items():
                gc.collect()
                elapsed, results[version] = _seconds(run)
                seconds[version].append(elapsed)
            found, expected = results[SUBJECT], results[REFERENCE]
            if found is not None and expected is not None:
                differences.append(relative_difference(name, found, expected, tolerance))
    finally:
        gc.unfreeze()
    return seconds, max(differences, default=None)


def relative_difference(name: str, found: Tensor, expected: Tensor, tolerance: float) -> float:
    """The norm of the results' difference, relative to that of the expected result; tokens must be equal.

    Raises:
        AgreementError: It is more than `tolerance`, or tokens differ.
    """
    if not expected.is_floating_point():
        if not torch.equal(found, expected):
            raise AgreementError(f"{name}: the versions generate different tokens.")
        return 0.0
    difference = ((found.float() - expected.float()).norm() / expected.float().norm()).item()
    if not difference <= tolerance:
        raise AgreementError(f"{name}: the results differ by {difference:.1e} of their norm, above {tolerance:.0e}.")
    return difference


def ratio(subject: list[float], reference: list[float]) -> dict[str, float]:
    """How many times faster the subject is: by the medians, and the extremes of the pairs."""
    pairs = [theirs / ours for ours, theirs in zip(subject, reference, strict=True)]
    return {"median": statistics.median(reference) / statistics.median(subject), "min": min(pairs), "max": max(pairs)}


def _time_record(samples: list[float], cost: Cost, least_seconds: float) -> dict[str, Any]:
    median = statistics.median(samples)
    low, high = numpy.percentile(samples, [20, 80]).tolist()
    return {
        "seconds": {"median": median, "p20": low, "p80": high, "samples": samples},
        f"{cost.unit}_per_second": cost.items / median,
        "share_of_limit": least_seconds / median,
    }


def in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """What the function returns, called in a new interpreter."""
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def peak_memory(case: Case, version: str, attention: str) -> int:
    """Bytes that preparing and running a case takes beyond what the process held after loading; for a fresh process."""
    loaded = case.load(version, attention)
    gc.collect()
    reset = Path("/proc/self/clear_refs")
    if not reset.exists():
        raise OSError("Peak memory is read from Linux's /proc, which this system lacks; pass --no-memory.")
    reset.write_text("5")  # the peak starts anew at the present size
    baseline = _resident("VmRSS")
    case.prepare(loaded, version)()
    return _resident("VmHWM") - baseline


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def write_json(path: Path, results: Mapping[str, Any]) -> None:
    """Replace the file in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(json.dumps(results, indent=2) + "\n")
    unfinished.replace(path)
