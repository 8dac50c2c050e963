"""How often Python waits for an accelerator: never in a decoding step, and once at most in a prompt or training step.

On a CPU whose tensors count as an accelerator's (see `tests.helpers.host_waits`); kernels are stand-ins that compute
nothing.
"""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DataCollatorWithFlattening
from transformers.integrations import flex_attention

from mistral_hf import RollingCache
from tests.helpers.flash_attention import shapes_only, use
from tests.helpers.host_waits import host_waits

BACK_ENDS = ("eager", "sdpa", "flex_attention", "flash_attention_2 of the package", "flash_attention_2 of PyTorch")
LENGTH = 12


@pytest.fixture(params=BACK_ENDS)
def model(request: pytest.FixtureRequest, make_model: Any, exact: None, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A model with each back end."""
    name, _, source = request.param.partition(" of ")
    use(shapes_only(torch_like=source == "PyTorch", device_type="cpu"), monkeypatch)
    monkeypatch.setattr(flex_attention, "compile_friendly_flex_attention", no_attention)
    return make_model("ForCausalLM", name, head_dim=16)


def no_attention(query: Tensor, key: Tensor, value: Tensor, return_lse: bool = False, **options: Any) -> Any:
    return (query, query[..., 0]) if return_lse else query


def mask_of(kind: str) -> dict[str, Tensor]:
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[0, :3] = int(kind != "padded")
    return {} if kind == "no mask" else {"attention_mask": mask}


KINDS = pytest.mark.parametrize("kind", ["no mask", "mask of ones", "padded"])


@KINDS
@pytest.mark.parametrize("cached", ["no cache", "new cache", "cache", "static cache"])
def test_a_prompt_waits_for_its_mask_only(
    cached: str, kind: str, model: Any, token_ids: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = mask_of(kind) | {"input_ids": token_ids(2, LENGTH), "use_cache": cached != "no cache"}
    if "new" not in cached and cached != "no cache":
        inputs["past_key_values"] = RollingCache(model.config, max_cache_len=32 if "static" in cached else None)
    with torch.no_grad(), host_waits(monkeypatch) as waits:
        model(**inputs)
    assert len(waits) <= (kind != "no mask"), waits


@KINDS
@pytest.mark.parametrize("static", [False, True])
def test_no_decoding_step_waits(
    static: bool, kind: str, model: Any, token_ids: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before, at and after the wrap, once the prompt has been read."""
    cache = RollingCache(model.config, max_cache_len=32 if static else None)
    ids, mask = token_ids(2, LENGTH), mask_of(kind).get("attention_mask")
    with torch.no_grad():
        for start, end in ((0, 6), *((index, index + 1) for index in range(6, LENGTH))):
            with host_waits(monkeypatch) as waits:
                seen = None if mask is None else mask[:, :end]
                model(ids[:, start:end], attention_mask=seen, past_key_values=cache)
            assert start == 0 or waits == []


@KINDS
@pytest.mark.parametrize("chunk", [None, 5])
def test_a_training_step_waits_for_its_mask_only(
    chunk: int | None, kind: str, model: Any, token_ids: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = token_ids(2, LENGTH)
    with host_waits(monkeypatch) as waits:
        model.train()(ids, labels=ids, loss_chunk_size=chunk, **mask_of(kind)).loss.backward()
    assert len(waits) <= (kind != "no mask"), waits


@pytest.mark.parametrize("how", ["positions", "bounds", "bounds alone"])
def test_a_packed_training_step_waits_unless_lengths_are_given(
    how: str, model: Any, sequences: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    collator = DataCollatorWithFlattening(
        return_flash_attn_kwargs=how != "positions", return_position_ids=how != "bounds alone"
    )
    batch = collator([dict(row) for row in sequences])
    with host_waits(monkeypatch) as waits:
        model.train()(**batch).loss.backward()
    assert len(waits) <= (how == "positions"), waits


def test_padding_with_positions_is_read_together(model: Any, token_ids: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    mask = mask_of("padded")["attention_mask"]
    with host_waits(monkeypatch) as waits:
        model(token_ids(2, LENGTH), attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0))
    assert len(waits) == 1


def test_right_padding_is_refused_in_a_step_before_the_device(
    exact: None, make_model: Any, token_ids: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The prompt's mask was read, so the step need not wait; nothing is asserted on the device."""
    use(shapes_only(torch_like=True, device_type="cpu"), monkeypatch)
    model, ids = make_model("ForCausalLM", "flash_attention_2", head_dim=16), token_ids(2, LENGTH + 1)
    mask = mask_of("padded")["attention_mask"].flip(1)
    with torch.no_grad():
        with host_waits(monkeypatch):
            cache = model(ids[:, :-1], attention_mask=mask, use_cache=True).past_key_values
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        with host_waits(monkeypatch) as waits, pytest.raises(ValueError, match="padding on the left only"):
            model(ids[:, -1:], attention_mask=mask, past_key_values=cache)
    assert waits == []


def test_right_padding_first_shown_in_a_step_is_read_once(
    exact: None, make_model: Any, token_ids: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(shapes_only(torch_like=True, device_type="cpu"), monkeypatch)
    model, ids = make_model("ForCausalLM", "flash_attention_2", head_dim=16), token_ids(2, LENGTH)
    cache, mask = RollingCache(model.config), mask_of("padded")["attention_mask"]
    with torch.no_grad(), host_waits(monkeypatch) as waits:
        model(ids[:, :6], past_key_values=cache)
        for end in range(7, LENGTH):
            model(ids[:, end - 1 : end], attention_mask=mask[:, :end], past_key_values=cache)
        assert len(waits) == 1
        with pytest.raises(ValueError, match="padding on the left only"):
            model(ids[:, -1:], attention_mask=mask.flip(1), past_key_values=filled_cache(model, ids[:, :-1]))


def filled_cache(model: Any, ids: Tensor) -> RollingCache:
    cache = RollingCache(model.config)
    model(ids, past_key_values=cache)
    return cache
