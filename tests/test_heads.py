"""The token that classification heads pool, and how losses add up over micro batches."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss
from transformers import Trainer, TrainingArguments

from tests.helpers.comparison import TIGHT

EXACT: dict[str, Any] = {"rtol": 0, "atol": 1e-6}
CLASSES = 4


@pytest.fixture
def classifier(make_model: Any) -> Any:
    return make_model("ForSequenceClassification", num_labels=CLASSES, pad_token_id=0)


def alone(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Logits of every row without its padding."""
    rows = zip(inputs["input_ids"], inputs["attention_mask"].bool(), strict=True)
    return torch.cat([model(ids[real][None], attention_mask=real[real][None]).logits for ids, real in rows])


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_last_real_token_is_pooled(side: str, classifier: Any, padded: Any) -> None:
    inputs = padded(12, 5, 1, side=side)
    expected = alone(classifier, inputs)
    torch.testing.assert_close(classifier(**inputs).logits, expected, **TIGHT)
    embeds = classifier.get_input_embeddings()(inputs["input_ids"])
    by_embeds = classifier(inputs_embeds=embeds, attention_mask=inputs["attention_mask"]).logits
    torch.testing.assert_close(by_embeds, expected, **TIGHT)
    boolean = classifier(inputs["input_ids"], attention_mask=inputs["attention_mask"].bool()).logits
    torch.testing.assert_close(boolean, expected, **TIGHT)


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_mask_tells_padding_from_an_end_token_with_the_same_id(side: str, make_model: Any, padded: Any) -> None:
    """Every text ends in id 2, which is also the padding: only the mask tells them apart."""
    model = make_model("ForSequenceClassification", pad_token_id=2, eos_token_id=2, num_labels=CLASSES)
    inputs = padded(12, 5, side=side)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    ids[mask == 0] = 2
    rows = torch.arange(2)
    ids[rows, (mask * torch.arange(12)).argmax(dim=1)] = 2
    torch.testing.assert_close(model(**inputs).logits, alone(model, inputs), **TIGHT)


def test_without_a_mask_the_last_token_with_another_id_than_padding_is_pooled(classifier: Any, padded: Any) -> None:
    inputs = padded(12, 5, side="right")
    torch.testing.assert_close(classifier(inputs["input_ids"]).logits, alone(classifier, inputs), **TIGHT)


def test_logits_match_the_reference_where_only_padding_has_the_padding_id(make_pair: Any, padded: Any) -> None:
    pair = make_pair("ForSequenceClassification", num_labels=CLASSES)
    for side in ("left", "right"):
        ours, stock = pair(**padded(12, 5, 9, side=side))
        torch.testing.assert_close(ours.logits, stock.logits, **TIGHT)


def test_the_last_real_token_is_pooled_after_cached_tokens(classifier: Any, padded: Any) -> None:
    inputs = padded(12, 5)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    cache = classifier(ids[:, :8], attention_mask=mask[:, :8]).past_key_values
    continued = classifier(ids[:, 8:], attention_mask=mask, past_key_values=cache).logits
    torch.testing.assert_close(continued, classifier(**inputs).logits, **TIGHT)


def test_a_custom_mask_pools_by_the_padding_id(classifier: Any, padded: Any) -> None:
    inputs = padded(12, 5, side="right")
    causal = torch.ones(12, 12).tril().triu(-7).bool()[None, None] & inputs["attention_mask"][:, None, None].bool()
    logits = classifier(inputs["input_ids"], attention_mask=causal, use_cache=False).logits
    torch.testing.assert_close(logits, alone(classifier, inputs), **TIGHT)


BATCH = 6
PROBLEMS: dict[str, tuple[str, dict[str, Any]]] = {
    "causal": ("ForCausalLM", {}),
    "tokens": ("ForTokenClassification", {"num_labels": CLASSES, "classifier_dropout": 0.0}),
    "single": ("ForSequenceClassification", {"num_labels": CLASSES}),
    "multi": ("ForSequenceClassification", {"num_labels": CLASSES}),
    "regression": ("ForSequenceClassification", {"num_labels": 1}),
    "regressions": ("ForSequenceClassification", {"num_labels": CLASSES, "problem_type": "regression"}),
    "answers": ("ForQuestionAnswering", {}),
}


def problem_batch(problem: str, padded: Any) -> dict[str, Tensor]:
    """Rows of very different lengths, for which a mean of means is visibly wrong."""
    inputs = padded(12, 3, 11, 2, 9, 4, side="right")
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    labels = {
        "causal": ids.masked_fill(mask == 0, -100),
        "tokens": (ids % CLASSES).masked_fill(mask == 0, -100),
        "single": torch.arange(BATCH) % CLASSES,
        "multi": (torch.arange(BATCH * CLASSES).view(BATCH, CLASSES) % 3 == 0).float(),
        "regression": torch.linspace(-1, 1, BATCH),
        "regressions": torch.linspace(-1, 1, BATCH * CLASSES).view(BATCH, CLASSES),
    }
    if problem == "answers":
        return inputs | {"start_positions": torch.arange(BATCH) % 3, "end_positions": torch.arange(BATCH) % 3 + 1}
    return inputs | {"labels": labels[problem]}


def label_count(problem: str, batch: dict[str, Tensor]) -> Tensor:
    """Number of labels other than -100 (of a language model, without the first of each row), as Trainer counts them."""
    if problem == "answers":
        return torch.tensor(len(batch["input_ids"]))
    labels = batch["labels"][:, 1:] if problem == "causal" else batch["labels"]
    return labels.ne(-100).sum()


def gradients(model: Any) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("as_tensor", [True, False])
@pytest.mark.parametrize("problem", PROBLEMS)
def test_losses_and_gradients_of_micro_batches_add_up(
    problem: str, as_tensor: bool, make_model: Any, padded: Any
) -> None:
    head, fields = PROBLEMS[problem]
    model = make_model(head, **fields).train()
    batch = problem_batch(problem, padded)
    whole = model(**batch)
    whole.loss.backward()
    expected = gradients(model)
    count = label_count(problem, batch)
    total = 0.0
    for rows in (slice(0, 1), slice(1, 4), slice(4, 6)):
        micro = {name: tensor[rows] for name, tensor in batch.items()}
        loss = model(**micro, num_items_in_batch=count if as_tensor else count.item()).loss
        loss.backward()
        total += loss.item()
    assert total == pytest.approx(whole.loss.item(), rel=1e-5)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], **TIGHT, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("problem", [name for name in PROBLEMS if name != "answers"])
def test_losses_match_the_reference_for_one_batch(problem: str, make_pair: Any, padded: Any) -> None:
    head, fields = PROBLEMS[problem]
    ours, stock = make_pair(head, **fields)(**problem_batch(problem, padded))
    torch.testing.assert_close(ours.loss, stock.loss, **TIGHT)


def test_sequence_losses_match_their_formulas(make_model: Any, padded: Any) -> None:
    for problem, formula in (
        ("single", cross_entropy),
        ("multi", binary_cross_entropy_with_logits),
        ("regressions", mse_loss),
    ):
        head, fields = PROBLEMS[problem]
        batch = problem_batch(problem, padded)
        output = make_model(head, **fields)(**batch)
        torch.testing.assert_close(output.loss, formula(output.logits, batch["labels"]), **EXACT)


@pytest.mark.parametrize("shape", [(BATCH,), (BATCH, 1)])
def test_regression_labels_may_be_a_vector_or_a_column(shape: tuple[int, ...], make_model: Any, padded: Any) -> None:
    """Labels ``[B]`` and logits ``[B, 1]`` do not broadcast to ``[B, B]``."""
    head, fields = PROBLEMS["regression"]
    batch = problem_batch("regression", padded)
    batch["labels"] = batch["labels"].view(shape)
    output = make_model(head, **fields)(**batch)
    expected = (output.logits.flatten() - batch["labels"].flatten()).pow(2).mean()
    torch.testing.assert_close(output.loss, expected, **EXACT)


def test_a_batch_does_not_decide_the_problem_type_of_the_next(make_model: Any, padded: Any) -> None:
    """Each call derives the problem type from its labels; the configuration, which is saved, stays unchanged."""
    model = make_model("ForSequenceClassification", num_labels=CLASSES)
    multi, single = problem_batch("multi", padded), problem_batch("single", padded)
    model(**multi)
    assert model.config.problem_type is None
    output = model(**single)
    torch.testing.assert_close(output.loss, cross_entropy(output.logits, single["labels"]), **EXACT)


def test_ignored_class_labels_do_not_count(make_model: Any, padded: Any) -> None:
    model = make_model("ForSequenceClassification", num_labels=CLASSES)
    batch = problem_batch("single", padded)
    batch["labels"][2:] = -100
    output = model(**batch)
    torch.testing.assert_close(output.loss, cross_entropy(output.logits[:2], batch["labels"][:2]), **EXACT)


def test_token_classification_matches_the_reference(make_pair: Any, padded: Any) -> None:
    pair = make_pair("ForTokenClassification", num_labels=CLASSES)
    batch = problem_batch("tokens", padded)
    ours, stock = pair(**batch)
    real = batch["attention_mask"].bool()
    assert ours.logits.shape == (BATCH, 12, CLASSES)
    torch.testing.assert_close(ours.logits[real], stock.logits[real], **TIGHT)
    expected = cross_entropy(ours.logits[real], batch["labels"][real])
    torch.testing.assert_close(ours.loss, expected, **EXACT)


@pytest.mark.parametrize(
    ("fields", "probability"),
    [({}, 0.1), ({"hidden_dropout": 0.3}, 0.3), ({"classifier_dropout": 0.0, "hidden_dropout": 0.3}, 0.0)],
)
def test_token_classification_dropout_follows_the_configuration(
    fields: dict[str, float], probability: float, make_pair: Any
) -> None:
    for model in make_pair("ForTokenClassification", **fields):
        assert model.dropout.p == probability


def test_question_answering_ignores_answers_outside_the_input(make_model: Any, token_ids: Any) -> None:
    model, ids = make_model("ForQuestionAnswering"), token_ids(2, 9)
    inside = model(ids[:1], start_positions=torch.tensor([2]), end_positions=torch.tensor([4])).loss
    both = model(ids, start_positions=torch.tensor([2, 50]), end_positions=torch.tensor([4, 50])).loss
    torch.testing.assert_close(both, inside, **EXACT)
    column = model(ids, start_positions=torch.tensor([[2], [50]]), end_positions=torch.tensor([[4], [50]])).loss
    torch.testing.assert_close(column, inside, **EXACT)


@pytest.mark.parametrize("problem", ["causal", "tokens", "single", "multi", "regression"])
def test_trainer_accumulates_to_the_large_batch(problem: str, make_model: Any, padded: Any, tmp_path: Path) -> None:
    """One optimiser step over micro batches of 2 moves the weights as a step over the batch of 6 does."""
    head, fields = PROBLEMS[problem]
    rows = problem_batch(problem, padded)
    data = [{name: tensor[row] for name, tensor in rows.items()} for row in range(BATCH)]
    weights = {}
    for size in (BATCH, 2):
        model = make_model(head, **fields)
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=BATCH // size,
            max_steps=1,
            learning_rate=0.1,
            optim="sgd",
            max_grad_norm=0,
            lr_scheduler_type="constant",
            train_sampling_strategy="sequential",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        )
        Trainer(model, arguments, train_dataset=data).train()
        weights[size] = {name: p.detach() for name, p in model.named_parameters()}
    start = make_model(head, **fields).state_dict()
    for name, expected in weights[BATCH].items():
        torch.testing.assert_close(weights[2][name], expected, **TIGHT, msg=lambda m, name=name: f"{name}: {m}")
    assert any((weights[2][name] - start[name]).abs().max() > 1e-3 for name in start)
