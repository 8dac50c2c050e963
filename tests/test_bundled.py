"""The trained checkpoint: parity with the library's model, and perplexity of held-out text."""

import math
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.models.mistral.modeling_mistral import MistralForCausalLM as StockMistral

from mistral_hf import BUNDLED_CHECKPOINT, MistralForCausalLM

LENGTH = 512


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(BUNDLED_CHECKPOINT)


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(BUNDLED_CHECKPOINT, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def blocks(tokenizer: Any) -> torch.Tensor:
    """Held-out text as ``[B, 512]`` ids."""
    text = (BUNDLED_CHECKPOINT / "heldout.txt").read_text()
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    return ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)[:8]


@torch.no_grad()
def perplexity(model: Any, ids: torch.Tensor, **inputs: Any) -> float:
    return math.exp(model(ids, labels=ids, **inputs).loss)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@torch.no_grad()
def test_logits_match_the_library(model: Any, blocks: torch.Tensor, implementation: str) -> None:
    """Within 1e-4 on trained weights, for texts four windows long."""
    stock = StockMistral.from_pretrained(BUNDLED_CHECKPOINT, dtype=torch.float32, attn_implementation=implementation)
    model.set_attn_implementation(implementation)
    torch.testing.assert_close(model(blocks[:2]).logits, stock.eval()(blocks[:2]).logits, rtol=0, atol=1e-4)
    model.set_attn_implementation("sdpa")


def test_greedy_text_is_token_identical(model: Any, tokenizer: Any) -> None:
    """256 tokens from prompts of several lengths in one left-padded batch, across the window twice."""
    stock = StockMistral.from_pretrained(BUNDLED_CHECKPOINT, dtype=torch.float32).eval()
    prompts = ["Once upon a time", "It is a truth universally acknowledged, that a single man", "The President"]
    inputs = tokenizer(prompts, return_tensors="pt", padding=True)
    options = {"max_new_tokens": 256, "min_new_tokens": 256, "do_sample": False}
    assert torch.equal(model.generate(**inputs, **options), stock.generate(**inputs, **options))


def test_the_window_that_it_was_trained_with_matters(model: Any, blocks: torch.Tensor) -> None:
    full = MistralForCausalLM.from_pretrained(BUNDLED_CHECKPOINT, dtype=torch.float32, sliding_window=None).eval()
    windowed = perplexity(model, blocks)
    assert 20 < windowed < 50
    assert perplexity(full, blocks) > 1.5 * windowed


def test_padding_changes_nothing(model: Any, tokenizer: Any, blocks: torch.Tensor) -> None:
    ids = torch.cat([torch.full((len(blocks), 37), tokenizer.pad_token_id), blocks], dim=1)
    labels = ids.clone()
    labels[:, :38] = -100  # the first real token has nothing before it
    with torch.no_grad():
        padded = math.exp(model(ids, attention_mask=(ids != tokenizer.pad_token_id).long(), labels=labels).loss)
    assert padded == pytest.approx(perplexity(model, blocks), rel=1e-4)


def test_bfloat16_and_four_bits_cost_little(model: Any, blocks: torch.Tensor) -> None:
    expected = perplexity(model, blocks)
    half = AutoModelForCausalLM.from_pretrained(BUNDLED_CHECKPOINT).eval()
    assert half.dtype == torch.bfloat16
    assert perplexity(half, blocks) == pytest.approx(expected, rel=0.01)
    pytest.importorskip("bitsandbytes")
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    four_bits = AutoModelForCausalLM.from_pretrained(
        BUNDLED_CHECKPOINT, dtype=torch.float32, quantization_config=quantization
    )
    assert perplexity(four_bits.eval(), blocks) == pytest.approx(expected, rel=0.05)
