"""Calls that cannot work: the error names the value, where it is, and the remedy."""

from typing import Any

import pytest
import torch

from mistral_hf import RollingCache
from tests.conftest import HEADS, VOCABULARY


@pytest.mark.parametrize("head", HEADS)
def test_both_or_neither_of_ids_and_embeddings_are_refused(head: str, make_model: Any, token_ids: Any) -> None:
    model, ids = make_model(head), token_ids(1, 4)
    embeds = model.get_input_embeddings()(ids)
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds, not both"):
        model(ids, inputs_embeds=embeds)
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds, not neither"):
        model()


@pytest.mark.parametrize("shape", [(2, 1, 5, 6), (2, 1, 4, 5), (2, 3, 5, 5)])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_a_custom_mask_of_a_wrong_shape_is_refused(
    implementation: str, shape: tuple[int, ...], make_model: Any, token_ids: Any
) -> None:
    with pytest.raises((ValueError, RuntimeError), match=r"attention_mask|shape|size|expand"):
        make_model(implementation=implementation)(token_ids(2, 5), attention_mask=torch.ones(shape).bool())


def test_inputs_embeds_of_a_wrong_width_are_refused(make_model: Any) -> None:
    with pytest.raises((ValueError, RuntimeError), match=r"inputs_embeds|shape|size"):
        make_model()(inputs_embeds=torch.zeros(1, 4, 31))


def test_ids_that_are_not_integers_are_refused(make_model: Any) -> None:
    with pytest.raises((TypeError, ValueError, RuntimeError), match=r"input_ids|Long|Int|int"):
        make_model()(torch.zeros(1, 4))


def test_a_cache_of_another_batch_is_refused(make_model: Any, token_ids: Any) -> None:
    model = make_model()
    cache = model(token_ids(2, 5)).past_key_values
    with pytest.raises(ValueError, match="cache holds 2 sequences, but the input has 3"):
        model(token_ids(3, 1), past_key_values=cache)


def test_a_cache_with_too_few_layers_is_refused(make_model: Any, token_ids: Any) -> None:
    """No layer is quietly left without a cache."""
    model, other = make_model(), make_model(num_hidden_layers=1)
    with pytest.raises((ValueError, IndexError)):
        model(token_ids(1, 5), past_key_values=RollingCache(other.config))


@pytest.mark.parametrize("head", ["ForCausalLM", "ForTokenClassification"])
def test_labels_of_another_length_are_refused(head: str, make_model: Any, token_ids: Any) -> None:
    labels = torch.zeros(2, 4, dtype=torch.long)
    with pytest.raises((ValueError, RuntimeError), match=r"labels|batch_size|shape|size"):
        make_model(head)(token_ids(2, 5), labels=labels)


@pytest.mark.parametrize(
    ("problem", "labels"),
    [
        ("regression", torch.zeros(3)),
        ("multi_label_classification", torch.zeros(3, 5)),
        ("multi_label_classification", torch.zeros(3, dtype=torch.long)),
    ],
)
def test_labels_that_do_not_fit_the_problem_are_refused(
    problem: str, labels: Any, make_model: Any, token_ids: Any
) -> None:
    model = make_model("ForSequenceClassification", num_labels=4, problem_type=problem)
    with pytest.raises(ValueError, match=rf"labels of shape .* do not fit {problem} with num_labels=4"):
        model(token_ids(3, 5), labels=labels)


def test_class_ids_that_are_not_integers_are_refused(make_model: Any, token_ids: Any) -> None:
    model = make_model("ForSequenceClassification", num_labels=4, problem_type="single_label_classification")
    with pytest.raises((ValueError, RuntimeError), match=r"labels|dtype|type|Long|Float"):
        model(token_ids(3, 5), labels=torch.zeros(3))


def test_an_unknown_problem_type_is_refused(make_model: Any, token_ids: Any) -> None:
    model = make_model("ForSequenceClassification", num_labels=4)
    vars(model.config)["problem_type"] = "divination"  # some releases check assignments
    with pytest.raises(ValueError, match="divination"):
        model(token_ids(3, 5), labels=torch.zeros(3, 4))


def test_an_answer_before_the_input_never_counts_as_the_first_token(make_model: Any, token_ids: Any) -> None:
    """It is refused, or ignored like an answer after the input."""
    model, ids, positions = make_model("ForQuestionAnswering"), token_ids(2, 5), torch.tensor([3, -1])
    inside = model(ids[:1], start_positions=positions[:1], end_positions=positions[:1]).loss
    try:
        loss = model(ids, start_positions=positions, end_positions=positions).loss
    except ValueError:
        return
    torch.testing.assert_close(loss, inside)


def test_a_batch_whose_padding_is_unknown_is_refused(make_model: Any, token_ids: Any) -> None:
    model = make_model("ForSequenceClassification", pad_token_id=None)
    with pytest.raises(ValueError, match=r"2 sequences.*pad_token_id is None.*attention_mask"):
        model(token_ids(2, 5))
    assert model(token_ids(1, 5)).logits.shape == (1, 2)
    assert model(token_ids(2, 5), attention_mask=torch.ones(2, 5)).logits.shape == (2, 2)


def test_logits_to_keep_outside_the_input_are_refused(make_model: Any, token_ids: Any) -> None:
    with pytest.raises(IndexError):
        make_model()(token_ids(1, 5), logits_to_keep=torch.tensor([5]))


def test_an_empty_input_is_refused_or_gives_no_logits(make_model: Any) -> None:
    """Without tokens there is an error or an empty result, never a made-up number."""
    try:
        logits = make_model()(torch.zeros(1, 0, dtype=torch.long)).logits
    except (ValueError, IndexError, RuntimeError):
        return
    assert logits.shape == (1, 0, VOCABULARY)
