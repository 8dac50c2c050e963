"""Positions, padding and packed sequences: what a model computes for them, and which layouts are refused."""

from typing import Any

import pytest
import torch
from transformers import DataCollatorWithFlattening

from mistral_hf import RollingCache
from tests.conftest import SEQUENCE_LENGTHS
from tests.helpers.comparison import TIGHT, assert_same_tensors, loss_and_gradients
from tests.helpers.packing import apart, flattened


@pytest.mark.parametrize("covered", [3, 6])
def test_an_attention_mask_of_another_length_is_refused(covered: int, make_model: Any, token_ids: Any) -> None:
    with pytest.raises(ValueError, match=rf"attention_mask covers {covered} tokens.* 0 cached and 5 new .* 5 columns"):
        make_model()(token_ids(2, 5), attention_mask=torch.ones(2, covered))


def test_an_attention_mask_without_the_cached_tokens_is_refused(make_model: Any, token_ids: Any) -> None:
    model = make_model()
    cache = model(token_ids(2, 5)).past_key_values
    with pytest.raises(ValueError, match=r"covers 1 tokens.* 5 cached and 1 new .* 6 columns"):
        model(token_ids(2, 1), attention_mask=torch.ones(2, 1), past_key_values=cache)
    assert cache.get_seq_length() == 5


@pytest.mark.parametrize("shape", [(5,), (2, 5, 5), (2, 1, 1, 5, 5)])
def test_an_attention_mask_of_other_dimensions_than_two_or_four_is_refused(
    shape: tuple[int, ...], make_model: Any, token_ids: Any
) -> None:
    with pytest.raises(ValueError, match=r"attention_mask has shape .*\[2, tokens\], or have 4 dimensions"):
        make_model()(token_ids(2, 5), attention_mask=torch.ones(shape))


@pytest.mark.parametrize(("batch", "rows"), [(2, 3), (1, 2)])
@pytest.mark.parametrize("padding", [True, False])
def test_an_attention_mask_of_another_batch_is_refused(
    batch: int, rows: int, padding: bool, make_model: Any, token_ids: Any
) -> None:
    mask = torch.ones(rows, 5)
    mask[:, 0] = 0 if padding else 1
    with pytest.raises(ValueError, match=rf"attention_mask.*{rows}.*{batch}"):
        make_model()(token_ids(batch, 5), attention_mask=mask)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("filler", [0, 1])
def test_positions_of_padding_may_be_anything(filler: int, side: str, make_model: Any, padded: Any) -> None:
    """``0 0 0 1 2``, as `generate` and collators number padded rows, is not packing."""
    inputs = padded(12, 5, 1, side=side)
    mask = inputs["attention_mask"]
    positions = (mask.cumsum(dim=1) - 1).masked_fill(mask == 0, filler)
    model, real = make_model(), mask.bool()
    expected = model(**inputs).logits
    torch.testing.assert_close(model(**inputs, position_ids=positions).logits[real], expected[real], **TIGHT)


def test_packed_sequences_do_not_see_each_other(make_model: Any, token_ids: Any) -> None:
    model, ids = make_model(), token_ids(1, 19)
    positions = torch.cat([torch.arange(7), torch.arange(12)])[None]
    packed = model(ids, position_ids=positions, use_cache=False).logits
    alone = torch.cat([model(ids[:, :7]).logits, model(ids[:, 7:]).logits], dim=1)
    torch.testing.assert_close(packed, alone, **TIGHT)


def test_every_row_may_hold_packed_sequences(make_model: Any, token_ids: Any) -> None:
    model, ids = make_model(), token_ids(2, 12)
    positions = torch.tensor([[*range(5), *range(7)], [*range(12)]])
    logits = model(ids, position_ids=positions).logits
    expected = [model(ids[:1, :5]).logits, model(ids[:1, 5:]).logits]
    torch.testing.assert_close(logits[:1], torch.cat(expected, dim=1), **TIGHT)
    torch.testing.assert_close(logits[1:], model(ids[1:]).logits, **TIGHT)


def test_packed_sequences_leave_no_cache_that_mixes_them(make_model: Any, sequences: Any) -> None:
    batch = flattened(sequences)
    output = make_model()(batch["input_ids"], position_ids=batch["position_ids"], use_cache=True)
    assert output.past_key_values is None
    expected = torch.cat([make_model()(row["input_ids"]).logits for row in apart(sequences)], dim=1)
    torch.testing.assert_close(output.logits, expected, **TIGHT)


def flattened_for_kernels(sequences: Any) -> dict[str, Any]:
    collator = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)
    return collator([dict(row) for row in sequences])


def padding_free(sequences: Any) -> dict[str, Any]:
    sft = pytest.importorskip("trl.trainer.sft_trainer")
    return sft.DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)(sequences)


def packed_row(sequences: Any) -> dict[str, Any]:
    """One long row with the lengths of its sequences, as TRL packs them."""
    ids = [token for row in sequences for token in row["input_ids"]]
    return {"input_ids": ids, "seq_lengths": [len(row["input_ids"]) for row in sequences]}


def packed(sequences: Any) -> dict[str, Any]:
    sft = pytest.importorskip("trl.trainer.sft_trainer")
    return sft.DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)([packed_row(sequences)])


def unmasked(sequences: Any) -> dict[str, Any]:
    """A collator that does not mask the labels at the starts of sequences."""
    batch = flattened(sequences)
    return batch | {"labels": batch["input_ids"].clone()}


def bounds_alone(sequences: Any) -> dict[str, Any]:
    collator = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_position_ids=False)
    return collator([dict(row) for row in sequences])


def numbers_alone(sequences: Any) -> dict[str, Any]:
    collator = DataCollatorWithFlattening(return_seq_idx=True, return_position_ids=False)
    return collator([dict(row) for row in sequences])


COLLATORS = {
    "flattened": flattened,
    "flattened for kernels": flattened_for_kernels,
    "padding-free": padding_free,
    "packed": packed,
    "unmasked": unmasked,
    "bounds alone": bounds_alone,
    "numbers alone": numbers_alone,
}


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("chunk", [None, 5])
@pytest.mark.parametrize("collator", COLLATORS)
def test_packed_sequences_train_as_if_alone(
    collator: str, chunk: int | None, implementation: str, make_model: Any, sequences: Any
) -> None:
    model = make_model(implementation=implementation, loss_chunk_size=chunk).train()
    count = sum(SEQUENCE_LENGTHS) - len(SEQUENCE_LENGTHS)
    expected = loss_and_gradients(model, *apart(sequences), num_items_in_batch=count)
    batch = COLLATORS[collator](sequences)
    assert batch["input_ids"].shape == (1, sum(SEQUENCE_LENGTHS))
    assert_same_tensors(loss_and_gradients(model, batch, num_items_in_batch=count), expected)
    assert_same_tensors(loss_and_gradients(model, batch), expected)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_long_packed_sequences_train_as_if_alone(implementation: str, make_model: Any, token_ids: Any) -> None:
    """Longer than a block of banded attention, with boundaries inside blocks and windows."""
    model = make_model(implementation=implementation, sliding_window=40).train()
    rows = [{"input_ids": token_ids(1, length, seed=length)[0].tolist()} for length in (301, 17, 250, 33)]
    batch = flattened(rows)
    singles = apart([{**row, "labels": row["input_ids"]} for row in rows])
    expected = loss_and_gradients(model, *singles, num_items_in_batch=597)
    assert_same_tensors(loss_and_gradients(model, batch), expected)


def wrong_mask(sequences: Any) -> dict[str, Any]:
    batch = flattened(sequences)
    return batch | {"attention_mask": torch.ones_like(batch["input_ids"])}


def wrong_mask_with_padding(sequences: Any) -> dict[str, Any]:
    """Padding between two sequences does not separate them."""
    batch = wrong_mask(sequences)
    batch["attention_mask"][:, SEQUENCE_LENGTHS[0]] = 0
    return batch


def wrong_trl_collator(sequences: Any) -> dict[str, Any]:
    sft = pytest.importorskip("trl.trainer.sft_trainer")
    return sft.DataCollatorForLanguageModeling(pad_token_id=0, return_position_ids=True)([packed_row(sequences)])


@pytest.mark.parametrize("collate", [wrong_mask, wrong_mask_with_padding, wrong_trl_collator])
def test_a_mask_that_lets_packed_sequences_see_each_other_is_refused(
    collate: Any, make_model: Any, sequences: Any
) -> None:
    batch = collate(sequences)
    with pytest.raises(ValueError, match=r"position_ids\[0, [78]\] restarts at [01].*without an attention_mask"):
        make_model()(**batch)


@pytest.mark.parametrize("mark", ["cu_seq_lens_q", "seq_idx"])
def test_packing_with_a_cache_is_refused(mark: str, make_model: Any, sequences: Any) -> None:
    """The sequences would see each other."""
    batch = (bounds_alone if mark == "cu_seq_lens_q" else numbers_alone)(sequences)
    model = make_model()
    with pytest.raises(ValueError, match=rf"{mark} marks packed sequences, which cannot continue those of a cache"):
        model(**batch, past_key_values=RollingCache(model.config))


@pytest.mark.parametrize(
    ("bounds", "message"),
    [([0, 3], r"rise from 0 to the 6 tokens of the row, but is \[0, 3\]"), ([0, 4, 3, 6], "rise"), ([1, 3, 6], "rise")],
)
def test_bounds_that_do_not_cover_the_row_are_refused(
    bounds: list[int], message: str, make_model: Any, token_ids: Any
) -> None:
    with pytest.raises(ValueError, match=message):
        make_model()(token_ids(1, 6), cu_seq_lens_q=torch.tensor(bounds, dtype=torch.int32))


def test_numbers_of_sequences_of_another_shape_are_refused(make_model: Any, token_ids: Any) -> None:
    with pytest.raises(ValueError, match=r"seq_idx has shape \(1, 5\); for 2 rows of 6 tokens it must be \[2, 6\]"):
        make_model()(token_ids(2, 6), seq_idx=torch.zeros(1, 5))


def test_numbers_mark_packed_sequences_in_every_row(make_model: Any, token_ids: Any) -> None:
    model, ids = make_model(), token_ids(2, 12)
    logits = model(ids, seq_idx=torch.tensor([[3] * 5 + [1] * 7, [0] * 12])).logits
    expected = [model(ids[:1, :5]).logits, model(ids[:1, 5:]).logits]
    torch.testing.assert_close(logits[:1], torch.cat(expected, dim=1), **TIGHT)
    torch.testing.assert_close(logits[1:], model(ids[1:]).logits, **TIGHT)
