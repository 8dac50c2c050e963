"""How a case is measured: interleaved samples, compared results, the machine's limits, and peak memory."""

import gc
import os
import platform
import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
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
# The largest difference between results, as a share of the reference's norm. In bfloat16 the reference itself is 3.9%
# from its float32 logits at 30 layers and 4.2% from its own eager attention, and mistral_hf is 4.1% from float32.
TOLERANCES = {"float32": 1e-4, "bfloat16": 8e-2}
CPU = torch.device("cpu")

Run = Callable[[], Tensor | None]


class AgreementError(RuntimeError):
    """Versions computed different results, which makes their times incomparable."""


@dataclass(frozen=True)
class Cost:
    """The least work of one sample, for any implementation.

    Attributes:
        items: Units of work.
        unit: Name of these units.
        bytes_moved: Bytes of weights, keys and values to read.
        operations: Multiplications and additions of the matrix products.
        dtype: Name of the dtype of the operations.
    """

    items: int
    unit: str
    bytes_moved: float
    operations: float
    dtype: str = "float32"


@dataclass(frozen=True, kw_only=True)
class Case(ABC):
    """One thing to measure. Peak memory counts what `prepare` and the run add to what `load` holds.

    Attributes:
        name: Its name on the command line.
        title: A short description.
        group: Name of the cases that are usually run together.
        repeats: Samples of each version.
        peak_memory: Whether to measure the peak memory too.
    """

    name: str
    title: str
    group: str
    repeats: int = 5
    peak_memory: bool = False

    def tiny(self) -> "Case":
        """The same case in the smallest sizes, to check that it runs; without a model, once."""
        return replace(self, repeats=1)

    def with_layers(self, layers: int) -> "Case":
        """The same case with a model of that many layers, if it has a model."""
        return self

    @abstractmethod
    def load(self, version: str, attention: str) -> Any:
        """The model, or whatever else exists before the work begins."""

    @abstractmethod
    def prepare(self, loaded: Any, version: str) -> Run:
        """A warmed-up function that does the work once and returns the result to compare between versions."""

    @abstractmethod
    def cost(self) -> Cost:
        """The least work of one run."""

    def settings(self) -> dict[str, Any]:
        """Every field except the names."""
        return {key: value for key, value in asdict(self).items() if key not in ("name", "title", "group")}

    def details(self) -> dict[str, Any]:
        """Further figures of the subject."""
        return {}


@dataclass(frozen=True)
class Limits:
    """The machine's best rates over several trials.

    Attributes:
        copy_bandwidth: Bytes/s of a copy, each byte counted twice.
        read_bandwidth: Bytes/s of a sum.
        matrix_rate: Operations/s of a matrix product, by dtype.
    """

    copy_bandwidth: float
    read_bandwidth: float
    matrix_rate: dict[str, float]

    def least_seconds(self, cost: Cost) -> tuple[float, str]:
        """The time that no implementation can beat on this machine, and the resource that sets it."""
        moving = cost.bytes_moved / max(self.copy_bandwidth, self.read_bandwidth)
        computing = cost.operations / self.matrix_rate[cost.dtype]
        return max((moving, "bytes moved"), (computing, "operations"))


def measure_limits(device: torch.device = CPU, dtypes: Sequence[str] = tuple(TOLERANCES), tiny: bool = False) -> Limits:
    """Measure copies, sums and square matrix products on a device.

    On a CPU, a rate is the better one of PyTorch's two libraries, MKL and oneDNN.
    """
    full = (512, 2048, 7) if device.type == "cpu" else (2048, 8192, 10)
    megabytes, order, trials = (1, 64, 2) if tiny else full

    def best_seconds(work: Callable[..., Any], *inputs: Tensor) -> float:
        def run() -> None:
            work(*inputs)
            synchronize(device)

        run()
        return min(_seconds(run)[0] for _ in range(trials))

    source = torch.ones(megabytes * 2**18, device=device)
    routes = (torch.matmul, _onednn_matmul) if device.type == "cpu" else (torch.matmul,)
    rates = {}
    for dtype in dtypes:
        a, b = torch.randn(2, order, order, device=device).to(getattr(torch, dtype)).unbind()
        rates[dtype] = 2 * order**3 / min(best_seconds(route, a, b) for route in routes)
    return Limits(
        copy_bandwidth=2 * source.nbytes / best_seconds(torch.empty_like(source).copy_, source),
        read_bandwidth=source.nbytes / best_seconds(torch.sum, source),
        matrix_rate=rates,
    )


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _onednn_matmul(a: Tensor, b: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")


def _seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def measure(case: Case, limits: Limits, attention: str, memory: bool = True) -> dict[str, Any]:
    """Measure a case with both versions.

    Args:
        case: The case.
        limits: The machine's limits.
        attention: Attention implementation of both versions.
        memory: Whether to measure the peak memory of the cases that have one.

    Returns:
        The record of the case, ready for JSON: times in seconds, memory in bytes.

    Raises:
        AgreementError: The versions disagree.
    """
    runs = {version: case.prepare(case.load(version, attention), version) for version in VERSIONS}
    seconds, difference = interleave(case.name, runs, case.repeats, TOLERANCES[case.cost().dtype])
    runs.clear()
    gc.collect()
    record = case_record(case, limits, seconds, difference) | {"details": case.details()}
    if memory and case.peak_memory:
        peaks = {version: in_fresh_process(peak_memory, case, version, attention) for version in VERSIONS}
        for version, peak in peaks.items():
            record["versions"][version]["peak_memory_bytes"] = peak
        record["memory_ratio"] = peaks[REFERENCE] / peaks[SUBJECT]
    return record


def case_record(
    case: Case, limits: Limits, seconds: Mapping[str, list[float]], difference: float | None
) -> dict[str, Any]:
    """The record of a case from the samples of its versions; the speedup is None unless both have run."""
    cost = case.cost()
    least, bound_by = limits.least_seconds(cost)
    return {
        "name": case.name,
        "title": case.title,
        "group": case.group,
        "settings": case.settings(),
        "versions": {version: _version_record(samples, cost, least) for version, samples in seconds.items()},
        "speedup": ratio(seconds[SUBJECT], seconds[REFERENCE]) if seconds.keys() >= set(VERSIONS) else None,
        "limit": {"seconds": least, "bound_by": bound_by, **asdict(cost)},
        "largest_relative_difference": difference,
    }


def _version_record(samples: list[float], cost: Cost, least_seconds: float) -> dict[str, Any]:
    median = statistics.median(samples)
    low, high = numpy.percentile(samples, [20, 80]).tolist()
    return {
        "seconds": {"median": median, "p20": low, "p80": high, "samples": samples},
        f"{cost.unit}_per_second": cost.items / median,
        "share_of_limit": least_seconds / median,
    }


def interleave(
    name: str, runs: Mapping[str, Run], repeats: int, tolerance: float, reference: str = REFERENCE
) -> tuple[dict[str, list[float]], float | None]:
    """Run all versions in turn, which exposes them to the same drifts of the machine, and compare their results.

    Args:
        name: The case's name, for the error message.
        runs: A function for each version.
        repeats: Samples of each version.
        tolerance: As of `check_agreement`.
        reference: The version to compare the others with.

    Returns:
        Seconds of every run by version, and the largest relative difference from the reference, if any was compared.

    Raises:
        AgreementError: The results of one round disagree.
    """
    seconds: dict[str, list[float]] = {version: [] for version in runs}
    differences: list[float] = []
    gc.collect()
    gc.freeze()  # from here on, garbage collection takes negligible time
    try:
        for _ in range(repeats):
            results = {}
            for version, run in runs.items():
                gc.collect()
                elapsed, results[version] = _seconds(run)
                seconds[version].append(elapsed)
            differences += check_agreement(name, results, tolerance, reference).values()
    finally:
        gc.unfreeze()
    return seconds, max(differences, default=None)


def medians(name: str, runs: Mapping[str, Run], repeats: int, tolerance: float, reference: str) -> dict[str, float]:
    """Median seconds of every run, after a warm-up; arguments as of `interleave`."""
    for run in runs.values():
        run()
    seconds, _ = interleave(name, runs, repeats, tolerance, reference)
    return {version: statistics.median(samples) for version, samples in seconds.items()}


def check_agreement(
    name: str, results: Mapping[str, Tensor | None], tolerance: float, reference: str = REFERENCE
) -> dict[str, float]:
    """Compare the results of all versions with the reference's: tokens must be equal, other values close.

    Returns:
        The norm of each version's difference, relative to that of the expected result; none without results.

    Raises:
        AgreementError: Tokens differ, or a relative difference is above `tolerance`.
    """
    expected = results.get(reference)
    if expected is None:
        return {}
    return {
        version: _relative_difference(f"{name}: {version} and {reference}", found, expected, tolerance)
        for version, found in results.items()
        if version != reference and found is not None
    }


def _relative_difference(names: str, found: Tensor, expected: Tensor, tolerance: float) -> float:
    if not expected.is_floating_point():
        if not torch.equal(found, expected):
            raise AgreementError(f"{names} generate different tokens.")
        return 0.0
    difference = ((found.float() - expected.float()).norm() / expected.float().norm()).item()
    if not difference <= tolerance:  # a NaN fails too
        raise AgreementError(f"{names} differ by {difference:.1e} of the results' norm, above {tolerance:.0e}.")
    return difference


def ratio(subject: Sequence[float], reference: Sequence[float]) -> dict[str, float]:
    """How many times faster the subject is: by the medians, and the extremes of the pairs."""
    pairs = [theirs / ours for ours, theirs in zip(subject, reference, strict=True)]
    return {"median": statistics.median(reference) / statistics.median(subject), "min": min(pairs), "max": max(pairs)}


def in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call the function in a new interpreter and return its result."""
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def peak_memory(case: Case, version: str, attention: str) -> int:
    """Bytes that preparing and running a case adds to what the process holds after loading; for a fresh process."""
    loaded = case.load(version, attention)
    gc.collect()
    reset = Path("/proc/self/clear_refs")
    if not reset.exists():
        raise OSError("Peak memory is read from Linux's /proc, which this system lacks; pass --no-memory.")
    reset.write_text("5")  # reset the peak to the present size
    baseline = _resident("VmRSS")
    case.prepare(loaded, version)()
    return _resident("VmHWM") - baseline


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


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
