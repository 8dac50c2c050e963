"""Draw prefill time and peak memory against the length: ``python -m benchmarks.plot RESULTS.json [--output PNG]``."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .harness import REFERENCE, SUBJECT

RESULTS = Path(__file__).parent / "results"
STYLES = {
    SUBJECT: {"label": "mistral_hf", "color": "tab:orange", "marker": "o"},
    REFERENCE: {"label": "Transformers", "color": "tab:gray", "marker": "s"},
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line `arguments`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plot", description=__doc__)
    parser.add_argument("results", type=Path, help="JSON that benchmarks.run wrote, with the group 'lengths'")
    parser.add_argument("--output", type=Path, default=RESULTS / "prefill_length.png", metavar="PNG")
    options = parser.parse_args(arguments)
    try:
        figure = draw(json.loads(options.results.read_text()))
    except (OSError, ValueError) as error:
        parser.error(str(error))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.output, dpi=150)
    print(f"written: {options.output}")


def draw(record: dict[str, Any]) -> Figure:
    """Two panels, time and memory, from a record of `benchmarks.run`.

    Raises:
        ValueError: The record does not hold at least two lengths.
    """
    results = [result for result in record["cases"] if result["group"] == "lengths" and "memory_ratio" in result]
    results.sort(key=lambda result: result["settings"]["length"])
    if len(results) < 2:
        raise ValueError(
            f"{len(results)} lengths with their peak memory are too few to plot: run benchmarks.run --cases lengths."
        )
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    time, memory = figure.subplots(1, 2)
    lengths = [result["settings"]["length"] for result in results]
    for version, style in STYLES.items():
        found = [result["versions"][version] for result in results]
        time.plot(lengths, [entry["seconds"]["median"] for entry in found], **style)
        memory.plot(lengths, [entry["peak_memory_bytes"] / 2**30 for entry in found], **style)
    time.plot(lengths, [result["limit"]["seconds"] for result in results], "k:", label="matrix rate of the machine")
    _finish(time, "time (s)", lengths)
    _finish(memory, "peak memory beyond the weights (GiB)", lengths)
    settings, machine = results[0]["settings"], record["environment"]
    shape = settings["shape"]
    figure.suptitle(
        f"Prefill, window of {settings['window']}: {shape['layers']} layers, hidden size {shape['hidden_size']},"
        f" {settings['dtype']}, {machine['cpu']}, {machine['threads']} threads",
        fontsize=10,
    )
    return figure


def _finish(axes: Axes, label: str, lengths: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(lengths, [f"{length // 1024}k" if length >= 1024 else str(length) for length in lengths])
    axes.set_xlabel("prompt length (tokens)")
    axes.set_ylabel(label)
    axes.grid(True, which="major", alpha=0.3)
    axes.legend(frameon=False)


if __name__ == "__main__":
    main()
