"""Checks of token ids and labels: an error names the index, the value and the range."""

from typing import Any

import pytest
import torch

from tests.conftest import HEADS, VOCABULARY


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("wrong", [-1, VOCABULARY, 10**6])
def test_ids_outside_the_vocabulary_are_refused(wrong: int, head: str, make_model: Any, token_ids: Any) -> None:
    ids = token_ids(2, 5)
    ids[1, 3] = wrong
    with pytest.raises(ValueError, match=rf"input_ids\[1, 3\] = {wrong}, .*\[0, {VOCABULARY}\).*tokenizer"):
        make_model(head)(ids, attention_mask=torch.ones_like(ids))


def test_a_refused_id_leaves_the_cache_unchanged(make_model: Any, token_ids: Any) -> None:
    model, ids = make_model(), token_ids(1, 5)
    cache = model(ids).past_key_values
    with pytest.raises(ValueError, match="input_ids"):
        model(torch.tensor([[VOCABULARY]]), past_key_values=cache)
    assert cache.get_seq_length() == 5


def test_generate_refuses_ids_outside_the_vocabulary(make_model: Any) -> None:
    with pytest.raises(ValueError, match=r"input_ids\[0, 1\] = 99"):
        make_model().generate(torch.tensor([[5, VOCABULARY]]), max_new_tokens=2)


@pytest.mark.parametrize("wrong", [-1, VOCABULARY, -101])
def test_labels_outside_the_vocabulary_are_refused(wrong: int, make_model: Any, token_ids: Any) -> None:
    labels = token_ids(2, 5)
    labels[0, 2] = wrong
    with pytest.raises(ValueError, match=rf"labels\[0, 2\] = {wrong}, .*\[0, {VOCABULARY}\).*-100"):
        make_model()(token_ids(2, 5), labels=labels)


@pytest.mark.parametrize(("head", "shape"), [("ForSequenceClassification", (3,)), ("ForTokenClassification", (3, 5))])
@pytest.mark.parametrize("wrong", [-1, 4, 17])
def test_labels_outside_the_classes_are_refused(
    wrong: int, head: str, shape: tuple[int, ...], make_model: Any, token_ids: Any
) -> None:
    labels = torch.zeros(shape, dtype=torch.long)
    labels[1] = wrong
    index = r"\[1\]" if len(shape) == 1 else r"\[1, 0\]"
    with pytest.raises(ValueError, match=rf"labels{index} = {wrong}, but must lie in \[0, 4\)"):
        make_model(head, num_labels=4)(token_ids(3, 5), labels=labels)
