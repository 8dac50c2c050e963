"""Measure training steps and 4-bit loading: ``python -m benchmarks.training --help``.

A step is forward, backward and AdamW, with gradient checkpointing in both versions, on the same data: one text of 4096
tokens, or texts of different lengths packed into as many. The subject computes its loss from all logits, as the
reference does, or in chunks.
"""

import argparse
import json
import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.utils.logging import disable_progress_bar

from mistral_hf import BUNDLED_CHECKPOINT, MistralConfig, MistralForCausalLM

from .harness import SUBJECT, Run, environment, in_fresh_process, measure, measure_limits, write_json
from .run import RESULTS, print_header, print_result
from .workloads import WARM_UP, Shape, Training

FOUR_LAYERS = Shape(layers=4)
TEXTS = (1280, 64, 700, 12, 256, 400, 90, 1294)  # tokens of packed texts


@dataclass(frozen=True, kw_only=True)
class Step(Training):
    """One step of 4096 tokens.

    Attributes:
        packed: The tokens are several texts, their positions restarting.
        chunk: Tokens whose logits the subject's loss needs at a time, or None for all at once.
    """

    length: int = 4096
    window: int | None = 1024
    shape: Shape = FOUR_LAYERS
    group: str = "training"
    repeats: int = 3
    peak_memory: bool = True
    packed: bool = False
    chunk: int | None = None

    def load(self, version: str, attention: str) -> Any:
        """The model, with gradient checkpointing."""
        model = super().load(version, attention)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        if version == SUBJECT:
            model.config.loss_chunk_size = self.chunk
        return model

    def prepare(self, model: Any, version: str) -> Run:
        """A run returns the loss and the norm of the gradient, ``[2]``."""
        inputs = {"input_ids": self.ids(self.length)}
        inputs["labels"] = inputs["input_ids"].clone()
        if self.packed:
            lengths = torch.tensor(TEXTS) * self.length // sum(TEXTS)
            lengths[-1] += self.length - lengths.sum()
            inputs["position_ids"] = torch.cat([torch.arange(length) for length in lengths.tolist()])[None]
            inputs["labels"][inputs["position_ids"] == 0] = -100
        model.train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

        def run(length: int = self.length) -> Tensor:
            loss = model(**{name: values[:, :length] for name, values in inputs.items()}, use_cache=False).loss
            loss.backward()
            norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
            optimizer.step()
            optimizer.zero_grad()
            return torch.stack([loss.detach(), norm])

        run(min(WARM_UP, self.length))
        return run


CASES = tuple(
    Step(
        name="_".join(["step", *(["packed"] if packed else []), *(["chunked"] if chunk else [])]),
        title=f"4096 {'packed ' if packed else ''}tokens{', the loss in chunks of 512' if chunk else ''}",
        packed=packed,
        chunk=chunk,
    )
    for packed in (False, True)
    for chunk in (None, 512)
)

FORMATS: dict[str, dict[str, Any]] = {
    "bfloat16": {},
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4, double": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
}
QUANTIZATION = "quantization"
TINY = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}


def measure_format(name: str, layers: int, **shape: int) -> dict[str, Any]:
    """Load a model of 7B shapes with few layers, and compute the perplexity of the bundled one; for a fresh process.

    Args:
        name: One of `FORMATS`.
        layers: Layers of the model.
        shape: Fields of the configuration in place of those of 7B.

    Returns:
        Seconds of loading; bytes of the loaded model, and of one of 32 layers; perplexity of the held-out text.
    """
    disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        model = MistralForCausalLM(MistralConfig(num_hidden_layers=layers, dtype="bfloat16", **shape))
        model.to(torch.bfloat16).save_pretrained(folder)
        _load(BUNDLED_CHECKPOINT, name)
        start = time.perf_counter()
        model = _load(folder, name)
        seconds = time.perf_counter() - start
        total, inside = _stored_bytes(model), _stored_bytes(model.model.layers)
    return {
        "format": name,
        "load_seconds": seconds,
        "bytes": total,
        "bytes_of_32_layers": total + (32 - layers) * inside // layers,
        "perplexity": _perplexity(_load(BUNDLED_CHECKPOINT, name)),
    }


def _stored_bytes(module: torch.nn.Module) -> int:
    """Bytes of the parameters and buffers, with the constants of quantized ones."""
    total = sum(buffer.nbytes for buffer in module.buffers())
    for parameter in module.parameters():
        state = getattr(parameter, "quant_state", None)
        constants = [] if state is None else [state.absmax, state.code]
        if state is not None and state.nested:
            constants += [state.state2.absmax, state.state2.code, state.offset]
        total += sum(part.nbytes for part in (parameter, *constants))
    return total


def _load(checkpoint: Any, name: str) -> Any:
    quantization = BitsAndBytesConfig(bnb_4bit_compute_dtype=torch.bfloat16, **FORMATS[name]) if FORMATS[name] else None
    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16, quantization_config=quantization)


@torch.no_grad()
def _perplexity(model: Any, length: int = 512) -> float:
    ids = AutoTokenizer.from_pretrained(BUNDLED_CHECKPOINT)(
        (BUNDLED_CHECKPOINT / "heldout.txt").read_text(encoding="utf-8"), verbose=False
    )["input_ids"]
    blocks = torch.tensor(ids[: len(ids) // length * length]).view(-1, length)
    return math.exp(model.eval()(blocks, labels=blocks).loss)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line `arguments`."""
    options = parse(arguments)
    record: dict[str, Any] = {"cases": {}, QUANTIZATION: {}}
    if options.output and options.output.exists():
        record |= json.loads(options.output.read_text())
    record["environment"] = environment()
    limits = measure_limits(1, 64, 2) if options.tiny else measure_limits()
    print_header(record["environment"], limits)
    for case in CASES:
        if case.name in options.cases:
            case = case.tiny() if options.tiny else case
            result = measure(case, limits, "sdpa", options.repeats, memory=not options.tiny)
            record["cases"][case.name] = result | {"limits": asdict(limits)}
            print_result(result)
    if QUANTIZATION in options.cases:
        for name in FORMATS:
            found = measure_format(name, 1, **TINY) if options.tiny else in_fresh_process(measure_format, name, 2)
            record[QUANTIZATION][name] = found
            print(
                f"{name:<12} loaded in {found['load_seconds']:.1f} s; 32 layers:"
                f" {found['bytes_of_32_layers'] / 2**30:.2f} GiB; perplexity {found['perplexity']:.2f}",
                flush=True,
            )
    if options.output:
        write_json(options.output, record)
        print(f"written: {options.output}")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    names = [*(case.name for case in CASES), QUANTIZATION]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training", description=__doc__)
    parser.add_argument("--cases", nargs="+", default=names, choices=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--repeats", type=int, metavar="N", help="samples of each version (default: 3)")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, to see that everything runs")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="JSON, whose other cases are kept (default: results/training.json)"
    )
    options = parser.parse_args(arguments)
    if options.output is None and not options.tiny:
        options.output = RESULTS / "training.json"
    return options


if __name__ == "__main__":
    main()
