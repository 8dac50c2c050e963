"""The memory layout for decoding: what it changes, and that nothing else can tell."""

from pathlib import Path
from typing import Any

import pytest
import torch

from mistral_hf import MistralForCausalLM
from mistral_hf.weight_layout import lay_out_for_decoding


@pytest.mark.parametrize("tied", [False, True])
def test_generate_for_one_row_stores_by_column_and_for_several_by_row(
    tied: bool, make_model: Any, token_ids: Any
) -> None:
    model = make_model(tie_word_embeddings=tied, num_hidden_layers=1, head_dim=16)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    model.generate(token_ids(1, 5), max_new_tokens=2)
    mlp = model.model.layers[0].mlp
    assert not mlp.up_proj.weight.is_contiguous()
    assert not model.lm_head.weight.is_contiguous()
    assert mlp.down_proj.weight.is_contiguous()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    model.generate(token_ids(2, 5), max_new_tokens=2)
    assert all(parameter.is_contiguous() for parameter in model.parameters())


def test_a_model_that_has_generated_trains_and_saves_as_before(make_model: Any, token_ids: Any, tmp_path: Path) -> None:
    model, twin = make_model(), make_model()
    with torch.inference_mode():
        model.generate(token_ids(1, 5), max_new_tokens=2)
    ids = token_ids(2, 12)
    for trained in (model, twin):
        optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-2)
        trained.train()(ids, labels=ids).loss.backward()
        optimizer.step()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path)
    loaded = MistralForCausalLM.from_pretrained(tmp_path)
    for ours, saved in zip(model.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(ours, saved)


def test_other_formats_and_modules_are_left_alone(make_model: Any) -> None:
    model = make_model(dtype="bfloat16").bfloat16()
    lay_out_for_decoding(model, rows=1)
    assert all(parameter.is_contiguous() for parameter in model.parameters())
