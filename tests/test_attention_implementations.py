"""Attention implementations of a model: chosen, switched, custom functions and custom masks."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from tests.helpers.comparison import TIGHT, assert_same_outputs
from tests.helpers.family import FAMILY

IMPLEMENTATIONS = ("eager", "sdpa")


@FAMILY
def test_the_attention_implementation_can_be_switched(make_pair: Any, padded: Any) -> None:
    pair, inputs = make_pair("ForCausalLM", "eager"), padded(12, 5)
    for implementation in ("sdpa", "eager", "sdpa"):
        for model in pair:
            model.set_attn_implementation(implementation)
            assert model.config._attn_implementation == implementation
            assert model.model.config._attn_implementation == implementation
        assert_same_outputs(*pair(**inputs), real=inputs["attention_mask"])


def test_an_unknown_implementation_is_refused(make_model: Any) -> None:
    with pytest.raises(ValueError, match="psychic"):
        make_model(implementation="psychic")
    with pytest.raises(ValueError, match="psychic"):
        make_model().set_attn_implementation("psychic")


@FAMILY
def test_flex_attention_matches_sdpa(make_model: Any, padded: Any) -> None:
    model = make_model(head_dim=16, num_hidden_layers=1)
    inputs = padded(40, 25)
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        expected = model(**inputs).logits
        model.set_attn_implementation("flex_attention")
        torch.testing.assert_close(model(**inputs, use_cache=False).logits[real], expected[real], **TIGHT)
        torch.testing.assert_close(model(**inputs).logits[real], expected[real], **TIGHT)


def test_attention_dropout_acts_in_training_only(make_model: Any, token_ids: Any) -> None:
    for implementation in IMPLEMENTATIONS:
        model, ids = make_model(implementation=implementation, attention_dropout=0.5), token_ids(1, 9)
        assert torch.equal(model(ids).logits, model(ids).logits)
        model.train()
        assert not torch.equal(model(ids, use_cache=False).logits, model(ids, use_cache=False).logits)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("additive", [False, True], ids=["boolean", "additive"])
@pytest.mark.parametrize("per_head", [False, True])
@FAMILY
def test_custom_masks_match_the_reference(
    implementation: str, additive: bool, per_head: bool, make_pair: Any, token_ids: Any
) -> None:
    """A block-wise bidirectional mask, which our mask functions cannot make, shared by all heads or different."""
    pair, ids = make_pair("ForCausalLM", implementation), token_ids(2, 12)
    blocks = torch.arange(12) // 4
    mask = (blocks[:, None] >= blocks).expand(2, 4 if per_head else 1, 12, 12).clone()
    if per_head:
        mask[:, 1] = mask[:, 1].tril()
    usual = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    ours = pair.ours(ids, attention_mask=usual if additive else mask, use_cache=False).logits
    # The reference's eager attention only adds masks.
    stock = pair.stock(ids, attention_mask=usual, use_cache=False).logits
    torch.testing.assert_close(ours, stock, **TIGHT)
    assert (ours - pair.ours(ids).logits).abs().max() > 0.1


@pytest.fixture
def spy() -> Iterator[list[Any]]:
    """The masks given to a custom attention function that is registered as ``"spy"``."""
    masks: list[Any] = []

    def attention(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, scaling: float, **kwargs: Any
    ) -> tuple[Tensor, None]:
        masks.append(attention_mask)
        output = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attention_mask, scale=scaling, enable_gqa=True, is_causal=attention_mask is None
        )
        return output.transpose(1, 2), None

    AttentionInterface.register("spy", attention)
    yield masks
    AttentionInterface._global_mapping.pop("spy")
    AttentionMaskInterface._global_mapping.pop("spy", None)


@pytest.mark.parametrize("with_mask", [True, False])
def test_a_custom_attention_gets_the_mask_that_is_registered_for_it(
    with_mask: bool, spy: list[Any], make_model: Any, padded: Any
) -> None:
    if with_mask:
        AttentionMaskInterface.register("spy", sdpa_mask)
    model = make_model(sliding_window=8 if with_mask else None)
    inputs = padded(19, 13) if with_mask else {"input_ids": padded(19)["input_ids"]}
    expected = model(**inputs).logits
    model.set_attn_implementation("spy")
    real = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
    torch.testing.assert_close(model(**inputs).logits[real], expected[real], **TIGHT)
    assert len(spy) == 2
    assert all((mask is not None) == with_mask for mask in spy)


def test_a_custom_attention_generates_the_same_text_from_a_cache(spy: list[Any], make_model: Any, padded: Any) -> None:
    AttentionMaskInterface.register("spy", sdpa_mask)
    model = make_model()
    inputs = padded(11, 5)
    expected = model.generate(**inputs, max_new_tokens=20, do_sample=False)
    model.set_attn_implementation("spy")
    assert torch.equal(model.generate(**inputs, max_new_tokens=20, do_sample=False), expected)
    assert len(spy) == 2 * 20
