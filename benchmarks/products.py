"""How fast the products of linear layers are: ``python -m benchmarks.products``.

`F.linear` beside `mistral_hf.products.linear`, in float32, for the layers of the 135M model and some numbers of rows.
Weights are taken in turn from 150 MB of them, so that they come from memory as in a model; routes alternate, and the
medians are written to ``results/products.json``.
"""

import statistics
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import nn

from mistral_hf.torch.linear import linear

from .harness import environment, write_json

SHAPES = ((1536, 576), (576, 1536), (576, 576), (192, 576), (49152, 576))
ROWS = (1, 2, 8, 64, 512)
RESULT = Path(__file__).parent / "results" / "products.json"
Route = Callable[[nn.Module, torch.Tensor], torch.Tensor]
ROUTES: dict[str, Route] = {"F.linear": lambda layer, states: layer(states), "mistral_hf": linear}


def main(repeats: int = 7, megabytes: int = 150, output: Path = RESULT) -> None:
    """Measure every shape and number of rows, and write GB/s of weights read and GFLOP/s."""
    record: dict[str, Any] = {"environment": environment(), "repeats": repeats, "products": []}
    for rows in ROWS:
        for outputs, inputs in SHAPES:
            count = max(1, round(megabytes * 1e6 / (4 * outputs * inputs))) if rows < 64 else 2
            layers = [nn.Linear(inputs, outputs, bias=False) for _ in range(count)]
            seconds = measure(layers, torch.randn(rows, inputs), repeats)
            entry: dict[str, Any] = {"rows": rows, "outputs": outputs, "inputs": inputs}
            for route, median in seconds.items():
                size = count * outputs * inputs
                entry[route] = {"GB/s": size * 4 / median / 1e9, "GFLOP/s": 2 * rows * size / median / 1e9}
            entry["ratio"] = seconds["F.linear"] / seconds["mistral_hf"]
            record["products"].append(entry)
            rates = "  ".join(f"{route} {entry[route]['GB/s']:.1f} GB/s" for route in ROUTES)
            print(f"{rows:>4} rows, {outputs:>5} x {inputs:<5} {rates}  {entry['ratio']:.2f}x", flush=True)
    write_json(output, record)


@torch.no_grad()
def measure(layers: list[nn.Linear], states: torch.Tensor, repeats: int) -> dict[str, float]:
    """Median seconds that each route takes for all layers."""
    samples: dict[str, list[float]] = {route: [] for route in ROUTES}
    for _ in range(repeats + 1):
        for route, product in ROUTES.items():
            start = perf_counter()
            for layer in layers:
                product(layer, states)
            samples[route].append(perf_counter() - start)
    return {route: statistics.median(times[1:]) for route, times in samples.items()}


if __name__ == "__main__":
    main()
