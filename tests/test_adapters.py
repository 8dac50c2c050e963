"""Adapters of PEFT: trained, saved and loaded, here and in the reference."""

import importlib.metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.integrations.peft import MIN_PEFT_VERSION

import mistral_hf
from tests.helpers.comparison import TIGHT


@pytest.fixture
def peft() -> Any:
    return pytest.importorskip("peft")


def trained_adapter(peft: Any, model: Any, ids: Tensor, folder: Path) -> Tensor:
    """Train an adapter on the attention and the feed-forward layers, save it, and return the logits."""
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"]))
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=0.05)
    for _ in range(3):
        adapted(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    adapted.save_pretrained(folder)
    with torch.no_grad():
        return adapted.eval()(ids).logits


@pytest.mark.parametrize("trained", ["ours", "stock"])
def test_adapters_are_exchanged_with_the_reference(
    trained: str, peft: Any, make_pair: Any, token_ids: Any, tmp_path: Path
) -> None:
    """An adapter trained on one model gives the other the same logits, loaded and merged."""
    ids, (ours, stock) = token_ids(2, 11), make_pair()
    plain = ours(ids).logits
    source, target = (ours, stock) if trained == "ours" else (stock, ours)
    expected = trained_adapter(peft, source, ids, tmp_path)
    assert not torch.allclose(plain, expected, atol=0.1)
    loaded = peft.PeftModel.from_pretrained(target, tmp_path)
    torch.testing.assert_close(loaded.eval()(ids).logits, expected, **TIGHT)
    merged = loaded.merge_and_unload()
    assert type(merged).__name__ == "MistralForCausalLM"
    assert {name for name, _ in merged.named_modules() if "lora" in name} == set()
    torch.testing.assert_close(merged(ids).logits, expected, **TIGHT)
    merged.save_pretrained(tmp_path / "merged")
    again = mistral_hf.MistralForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(again(ids).logits, expected, **TIGHT)


def test_adapters_load_through_load_adapter_and_from_pretrained(
    peft: Any, make_model: Any, token_ids: Any, tmp_path: Path
) -> None:
    """A folder that holds only the adapter loads too."""
    ids, base = token_ids(1, 9), tmp_path / "base"
    make_model().save_pretrained(base)
    expected = trained_adapter(peft, AutoModelForCausalLM.from_pretrained(base), ids, tmp_path / "adapter")
    model = make_model()
    model.load_adapter(str(tmp_path / "adapter"))
    torch.testing.assert_close(model(ids).logits, expected, **TIGHT)
    both = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert isinstance(both, mistral_hf.MistralForCausalLM)
    torch.testing.assert_close(both(ids).logits, expected, **TIGHT)


@pytest.mark.skipif(
    Version(importlib.metadata.version("peft")) < Version(MIN_PEFT_VERSION),
    reason=f"the library switches adapters off with peft {MIN_PEFT_VERSION} alone",
)
def test_loaded_adapters_can_be_switched_off(peft: Any, make_model: Any, token_ids: Any, tmp_path: Path) -> None:
    model, ids = make_model(), token_ids(1, 9)
    plain = model(ids).logits
    trained_adapter(peft, make_model(), ids, tmp_path)
    model.load_adapter(str(tmp_path))
    assert not torch.allclose(model(ids).logits, plain, **TIGHT)
    model.disable_adapters()
    torch.testing.assert_close(model(ids).logits, plain, **TIGHT)


@pytest.mark.parametrize("other", [{"hidden_size": 40}, {"num_key_value_heads": 4}, {"intermediate_size": 64}])
def test_an_adapter_for_another_shape_is_refused(
    other: Any, peft: Any, make_model: Any, token_ids: Any, tmp_path: Path
) -> None:
    trained_adapter(peft, make_model(**other), token_ids(1, 9), tmp_path)
    with pytest.raises(RuntimeError, match=r"size mismatch for .*lora_[AB]"):
        peft.PeftModel.from_pretrained(make_model(), tmp_path)
    model = make_model()
    with pytest.raises((RuntimeError, ValueError), match=r"size mismatch|mismatch"):
        model.load_adapter(str(tmp_path))


def test_a_tuned_head_is_saved_with_the_adapter(peft: Any, make_model: Any, token_ids: Any, tmp_path: Path) -> None:
    """The new head of a classifier is part of the adapter."""
    ids, labels = token_ids(4, 9), torch.tensor([0, 1, 0, 1])
    model = peft.get_peft_model(
        make_model("ForSequenceClassification"), peft.LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["q_proj"])
    )
    torch.nn.init.normal_(model.base_model.model.score.modules_to_save["default"].weight)
    model(ids, attention_mask=torch.ones_like(ids), labels=labels).loss.backward()
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(make_model("ForSequenceClassification"), tmp_path)
    mask = torch.ones_like(ids)
    torch.testing.assert_close(again(ids, attention_mask=mask).logits, model.eval()(ids, attention_mask=mask).logits)
