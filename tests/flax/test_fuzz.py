"""Differential fuzz: random configurations and inputs, the JAX model beside the PyTorch model in float32.

``pytest -m slow tests/flax/test_fuzz.py`` runs 1,000 configurations.
"""

import os
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from mistral_hf import MistralConfig, MistralForCausalLM
from mistral_hf.rope import ROTARY_TYPES
from tests.helpers.flax_models import arrays, differences, stacked, to_flax

VOCABULARY = 61
PADDING = 60  # after the end and in no prompt, where the library would mask it; the id 0 it takes for none in beams
ATOL = 1e-4
BUDGET, SLOW_BUDGET = 5, int(os.environ.get("FUZZ_CASES", "1000"))


class Case(NamedTuple):
    """A configuration and inputs, all from one seed.

    Attributes:
        model: In PyTorch.
        inputs: ``input_ids``, and ``attention_mask`` or the ``position_ids`` of packed sequences, or neither.
        scanned: Whether the JAX model's layers are stacked.
        options: Of `generate`; empty where the inputs are not padded on the left.
    """

    model: Any
    inputs: dict[str, torch.Tensor]
    scanned: bool
    options: dict[str, Any]


def rope(random: np.random.Generator, half: int) -> dict[str, Any]:
    """Parameters of a random rotary type, whose pretrained length is short."""
    kind = str(random.choice(sorted(ROTARY_TYPES)))
    fields: dict[str, Any] = {"rope_type": kind, "rope_theta": float(random.choice([50.0, 1e4, 1e6]))}
    if kind in ("linear", "dynamic", "yarn", "llama3", "longrope"):
        fields["factor"] = float(random.choice([1.0, 2.0, 4.0]))
    if kind in ("yarn", "llama3", "longrope"):
        fields["original_max_position_embeddings"] = int(random.choice([8, 64]))
    if kind == "llama3":
        fields |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    if kind == "longrope":
        fields |= {f"{name}_factor": random.uniform(1, 4, half).tolist() for name in ("short", "long")}
    if kind == "proportional":
        fields["partial_rotary_factor"] = float(random.choice([0.25, 0.5, 1.0]))
    return fields


def draw(seed: int) -> Case:
    """The case of a seed."""
    random = np.random.default_rng(seed)
    kv_heads, groups, head_dim = int(random.integers(1, 4)), int(random.integers(1, 4)), 2 * int(random.integers(2, 7))
    window = [None, 1, 2, 3, 5, 8, 17][random.integers(7)]
    config = MistralConfig(
        vocab_size=VOCABULARY,
        hidden_size=8 * int(random.integers(1, 5)),
        intermediate_size=int(random.integers(4, 40)),
        num_hidden_layers=int(random.integers(1, 4)),
        num_attention_heads=kv_heads * groups,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=int(random.choice([16, 1024])),
        sliding_window=window,
        initializer_range=0.2,
        rms_norm_eps=float(random.choice([1e-6, 1e-5])),
        tie_word_embeddings=bool(random.integers(2)),
        rope_parameters=rope(random, head_dim // 2),
        hidden_act=str(random.choice(["silu", "gelu", "relu2"])),
        pad_token_id=0,
        eos_token_id=None,
        attn_implementation="sdpa",
    )
    torch.manual_seed(seed)
    model = MistralForCausalLM(config).eval()
    batch, length = (
        int(random.integers(1, 4)),
        int(random.choice([1, 2, 7, 16, 33, 300] if seed % 10 == 0 else [1, 2, 7, 16, 33])),
    )
    inputs = {"input_ids": torch.tensor(random.integers(1, PADDING, (batch, length)))}
    layout = str(random.choice(["plain", "left", "right", "mixed", "packed"]))
    if layout == "packed":
        restarts = random.random((batch, length)) < 0.2
        starts = np.maximum.accumulate(np.where(restarts, np.arange(length), 0), axis=1)
        inputs["position_ids"] = torch.tensor(np.arange(length) - starts)
    elif layout != "plain":
        inputs["attention_mask"] = torch.tensor(padding(random, batch, length, layout))
        inputs["input_ids"] *= inputs["attention_mask"]
    generates = layout in ("plain", "left") and length < 100
    return Case(model, inputs, bool(random.integers(2)), options_of(random, batch, layout) if generates else {})


def padding(random: np.random.Generator, batch: int, length: int, layout: str) -> np.ndarray:
    """A mask with at least one real token a row."""
    mask = np.ones((batch, length), int)
    for row, count in zip(mask, random.integers(0, length, batch), strict=True):
        side = layout if layout != "mixed" else str(random.choice(["left", "right"]))
        row[:count] = side != "left"
        row[length - count :] = np.where(side == "right", 0, row[length - count :])
    return mask


def options_of(random: np.random.Generator, batch: int, layout: str) -> dict[str, Any]:
    """Options of `generate` whose result does not depend on chance."""
    options: dict[str, Any] = {
        "max_new_tokens": int(random.integers(1, 12)),
        "do_sample": False,
        "pad_token_id": PADDING,
    }
    kind = str(random.choice(["greedy", "ends", "beams", "chunks", "lookup", "penalty"]))
    if kind == "beams":
        beams = int(random.integers(2, 5))
        options |= {"num_beams": beams, "num_return_sequences": int(random.integers(1, beams + 1))}
        options |= {"length_penalty": float(random.choice([0.5, 1.0, 2.0])), "early_stopping": bool(random.integers(2))}
    if kind in ("ends", "beams"):
        options["eos_token_id"] = random.choice(np.arange(1, PADDING), 12, replace=False).tolist()
    if kind == "chunks":
        options["prefill_chunk_size"] = int(random.integers(1, 20))
    if kind == "lookup" and batch == 1:
        options["prompt_lookup_num_tokens"] = int(random.integers(1, 6))
    if kind == "penalty" and layout == "plain":  # PyTorch would penalize the padding token too
        options["repetition_penalty"] = float(random.choice([0.8, 1.5]))
    return options


def check(seed: int) -> int:
    """Compare one case, and return the number of values that were compared."""
    case = draw(seed)
    twin, given = to_flax(case.model), arrays(case.inputs)
    if case.scanned:
        twin = stacked(twin)
    with torch.no_grad():
        expected = case.model(**case.inputs).logits
    real = case.inputs.get("attention_mask", torch.ones_like(case.inputs["input_ids"]))
    error = differences(twin(**given).logits, expected, real)
    assert error < ATOL * max(1.0, float(expected.abs().max())), f"seed {seed}: logits differ by {error}"
    compared = int(real.sum()) * VOCABULARY
    if not case.options:
        return compared
    found = twin.generate(**given, **case.options).sequences
    theirs = dict(case.options)
    theirs.pop("prompt_lookup_num_tokens", None)  # its tokens are those of greedy search
    theirs.pop("prefill_chunk_size", None)
    reference = case.model.generate(**case.inputs, **theirs).numpy()
    assert np.array_equal(found, reference), f"seed {seed}: {case.options} gives {found}, not {reference}"
    return compared + found.size


@pytest.mark.parametrize("seed", range(BUDGET))
def test_a_random_model_computes_what_pytorch_computes(seed: int) -> None:
    assert check(seed) > 0


@pytest.mark.slow
def test_many_random_models_compute_what_pytorch_computes() -> None:
    failed, compared = [], 0
    for seed in range(BUDGET, BUDGET + SLOW_BUDGET):
        try:
            compared += check(seed)
        except AssertionError as error:
            failed.append(str(error).splitlines()[0])
    print(f"{SLOW_BUDGET} configurations, {compared} values, {len(failed)} differences")
    assert not failed, "\n".join(failed)
