"""The language-model loss in chunks equals the ordinary loss, and a loss whose labels are all ignored is zero."""

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM
from transformers.models.mistral.modeling_mistral import MistralForCausalLM as StockMistral
from transformers.trainer_pt_utils import LabelSmoother

from mistral_hf import MistralConfig
from tests.conftest import VOCABULARY
from tests.helpers.comparison import TIGHT, assert_same_tensors, loss_and_gradients

LENGTH = 11
CHUNKS = (1, 4, 2 * LENGTH, 1000)


@pytest.fixture
def batch(token_ids: Any) -> dict[str, Tensor]:
    """Two rows; the loss ignores the beginning of one and the end of the other."""
    ids = token_ids(2, LENGTH)
    labels = ids.clone()
    labels[0, :3] = labels[1, -4:] = -100
    return {"input_ids": ids, "labels": labels}


class Hooked(nn.Linear):
    """A subclass that a wrapper puts in place of a linear layer."""


def hook(model: Any) -> None:
    """Scale the logits by a parameter that is trained as well."""
    model.scale = nn.Parameter(torch.tensor(2.0))
    model.lm_head.register_forward_hook(lambda module, inputs, output: model.scale.to(output.dtype) * output)


HEADS: dict[str, Callable[[Any], None]] = {
    "plain": lambda model: None,
    "frozen": lambda model: model.lm_head.requires_grad_(False),
    "head only": lambda model: model.model.requires_grad_(False),
    "hooked": hook,
    "wrapped": lambda model: setattr(model.lm_head, "__class__", Hooked),
    "biased": lambda model: setattr(model.lm_head, "bias", nn.Parameter(torch.linspace(-1, 1, VOCABULARY))),
    "overridden": lambda model: setattr(
        model.lm_head, "forward", lambda states: states @ (model.lm_head.weight.t() + 1)
    ),
}


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("head", HEADS)
def test_chunks_give_the_ordinary_loss_and_gradients(head: str, chunk: int, make_model: Any, batch: Any) -> None:
    model = make_model()
    HEADS[head](model)
    expected = loss_and_gradients(model, batch)
    assert max(gradient.abs().max() for name, gradient in expected.items() if name != "loss") > 1e-3
    assert_same_tensors(loss_and_gradients(model, batch, loss_chunk_size=chunk), expected)


@pytest.mark.parametrize("chunk", [None, 4])
@pytest.mark.parametrize("tied", [False, True])
def test_loss_and_gradients_match_the_reference(tied: bool, chunk: int | None, make_pair: Any, batch: Any) -> None:
    ours, stock = make_pair(tie_word_embeddings=tied, loss_chunk_size=chunk)
    expected = loss_and_gradients(stock, batch)
    assert ("lm_head.weight" in expected) != tied
    assert_same_tensors(loss_and_gradients(ours, batch), expected)


@pytest.mark.parametrize("head", ["plain", "hooked"])
@pytest.mark.parametrize("count", [7, torch.tensor(7), torch.tensor(3.5)])
def test_the_loss_is_divided_by_the_number_of_items(count: Any, head: str, make_model: Any, batch: Any) -> None:
    model = make_model()
    HEADS[head](model)
    expected = loss_and_gradients(model, batch, num_items_in_batch=count)
    labels = batch["labels"][:, 1:].ne(-100).sum()
    torch.testing.assert_close(expected["loss"], loss_and_gradients(model, batch)["loss"] * labels / count, **TIGHT)
    assert_same_tensors(loss_and_gradients(model, batch, num_items_in_batch=count, loss_chunk_size=4), expected)


@pytest.mark.parametrize("head", ["plain", "hooked"])
def test_shifted_labels_and_another_ignored_index_are_honoured(
    head: str, make_model: Any, batch: Any, token_ids: Any
) -> None:
    model = make_model()
    HEADS[head](model)
    batch["shift_labels"] = token_ids(2, LENGTH, seed=5)
    batch["shift_labels"][:, 2:5] = 0
    expected = loss_and_gradients(model, batch, ignore_index=0)
    logits = model(batch["input_ids"]).logits.flatten(0, 1)
    kept = batch["shift_labels"].flatten() != 0
    torch.testing.assert_close(expected["loss"], cross_entropy(logits[kept], batch["shift_labels"].flatten()[kept]))
    assert_same_tensors(loss_and_gradients(model, batch, ignore_index=0, loss_chunk_size=4), expected)


@pytest.mark.parametrize("head", ["plain", "hooked"])
@pytest.mark.parametrize("count", [None, torch.tensor(7)])
def test_label_smoothing_matches_the_trainer(count: Any, head: str, make_model: Any, batch: Any) -> None:
    model = make_model()
    HEADS[head](model)
    output = model(batch["input_ids"])
    smoother = LabelSmoother(epsilon=0.2)
    smoother(output, batch["labels"], shift_labels=True, num_items_in_batch=count).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    for keywords in ({}, {"loss_chunk_size": 4}):
        found = loss_and_gradients(model, batch, num_items_in_batch=count, label_smoothing=0.2, **keywords)
        loss = found.pop("loss")
        torch.testing.assert_close(
            loss, smoother(output, batch["labels"], shift_labels=True, num_items_in_batch=count).detach(), **TIGHT
        )
        assert_same_tensors(found, expected)
    model.config.label_smoothing = 0.2
    torch.testing.assert_close(model(**batch, num_items_in_batch=count).loss.detach(), loss, **TIGHT)


def test_training_without_labels_holds_all_logits_and_warns(make_model: Any, batch: Any) -> None:
    """Trainer's `label_smoothing_factor` does this: it computes its loss from the logits."""
    model = make_model(loss_chunk_size=4).train()
    with pytest.warns(UserWarning, match=r"loss_chunk_size=4 has no effect.*label_smoothing_factor.*label_smoothing"):
        assert model(batch["input_ids"]).logits is not None


def test_an_adapter_on_the_head_trains_in_chunks(make_model: Any, batch: Any) -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        make_model(), peft.LoraConfig(r=4, target_modules=["lm_head", "q_proj"], init_lora_weights=False)
    )
    expected = loss_and_gradients(model, batch)
    assert any("lm_head.lora_A" in name for name in expected)
    assert_same_tensors(loss_and_gradients(model, batch, loss_chunk_size=4), expected)


def assert_as_precise(found: dict[str, Tensor], ordinary: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    """They are at most 1.5 times as far from the float32 values as the ordinary loss in half precision."""
    for name, value in exact.items():
        assert found[name].dtype == ordinary[name].dtype
        error = (ordinary[name].float() - value).norm()
        assert error > 0
        assert (found[name].float() - value).norm() <= 1.5 * error, name


@pytest.mark.parametrize("chunk", CHUNKS)
def test_chunks_in_bfloat16_are_as_precise_as_the_ordinary_loss(chunk: int, make_model: Any, batch: Any) -> None:
    exact = loss_and_gradients(make_model(), batch)
    model = make_model().to(torch.bfloat16)
    ordinary = loss_and_gradients(model, batch)
    assert_as_precise(loss_and_gradients(model, batch, loss_chunk_size=chunk), ordinary, exact)


@pytest.mark.parametrize("head", ["plain", "hooked"])
def test_chunks_under_autocast_are_as_precise_as_the_ordinary_loss(head: str, make_model: Any, batch: Any) -> None:
    model = make_model()
    HEADS[head](model)
    exact = loss_and_gradients(model, batch)
    with torch.autocast("cpu", torch.bfloat16):
        ordinary = loss_and_gradients(model, batch)
        found = loss_and_gradients(model, batch, loss_chunk_size=4)
    assert found["lm_head.weight"].dtype == torch.float32
    assert_as_precise(found, ordinary, exact)


def test_a_retained_graph_gives_the_gradients_again(make_model: Any, batch: Any) -> None:
    """A retained graph gives the gradients again."""
    model = make_model()
    expected = loss_and_gradients(model, batch)
    model.zero_grad()
    loss = model(**batch, loss_chunk_size=4).loss
    loss.backward(retain_graph=True)
    loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, 2 * expected[name], **TIGHT)


def test_chunks_without_gradients_give_the_same_loss(make_model: Any, batch: Any) -> None:
    model = make_model()
    expected = model(**batch).loss
    with torch.no_grad():
        losses = [model(**batch, loss_chunk_size=4).loss]
    model.requires_grad_(False)
    losses.append(model(**batch, loss_chunk_size=4).loss)
    for loss in losses:
        assert not loss.requires_grad
        torch.testing.assert_close(loss, expected.detach(), **TIGHT)


class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
    """The largest number of elements in a result of any operation."""

    largest = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        tensors = [t for t in torch.utils._pytree.tree_leaves(result) if isinstance(t, Tensor)]
        self.largest = max([self.largest, *(t.numel() for t in tensors)])
        return result


@pytest.mark.parametrize("head", ["plain", "hooked"])
def test_chunks_never_hold_all_logits(head: str, make_model: Any, token_ids: Any) -> None:
    vocabulary, length, chunk = 1000, 400, 16
    model = make_model(vocab_size=vocabulary).train()
    HEADS[head](model)
    ids = token_ids(1, length)
    largest = {}
    for size in (chunk, None):
        with Sizes() as sizes:
            model(ids, labels=ids, use_cache=False, loss_chunk_size=size).loss.backward()
        largest[size] = sizes.largest
    assert largest[None] == length * vocabulary
    assert largest[chunk] < length * vocabulary // 2


def test_logits_are_returned_unless_the_loss_is_computed_in_chunks(make_model: Any, batch: Any) -> None:
    model = make_model(loss_chunk_size=4)
    for training in (False, True):
        model.train(training)
        assert model(**batch).logits is None
        assert model(**batch, return_dict=False)[0].ndim == 0
        assert model(batch["input_ids"]).logits.shape == (2, LENGTH, VOCABULARY)
    model.config.loss_chunk_size = None
    assert model(**batch).logits.shape == (2, LENGTH, VOCABULARY)
    assert model.generate(batch["input_ids"], max_new_tokens=2).shape == (2, LENGTH + 2)


def test_loss_options_are_saved_only_if_they_are_set(make_model: Any, tmp_path: Path) -> None:
    model = make_model()
    model.save_pretrained(tmp_path / "plain")
    assert "loss_chunk_size" not in (tmp_path / "plain/config.json").read_text()
    assert "label_smoothing" not in (tmp_path / "plain/config.json").read_text()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", loss_chunk_size=4, label_smoothing=0.1)
    loaded.save_pretrained(tmp_path / "set")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "set").config
    assert (again.loss_chunk_size, again.label_smoothing) == (4, 0.1)
    stock = StockMistral.from_pretrained(tmp_path / "set")
    assert torch.equal(stock.lm_head.weight, model.lm_head.weight)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"loss_chunk_size": 0}, r"loss_chunk_size=0 must be at least 1"),
        ({"loss_chunk_size": -4}, r"loss_chunk_size=-4 must be at least 1"),
        ({"label_smoothing": 1.0}, r"label_smoothing=1.0 must lie in \[0, 1\)"),
        ({"label_smoothing": -0.1}, r"label_smoothing=-0.1 must lie in \[0, 1\)"),
    ],
)
def test_impossible_options_are_refused(fields: dict[str, Any], message: str, tiny: Any) -> None:
    with pytest.raises(ValueError, match=message):
        MistralConfig(**tiny(**fields))


def test_calls_that_cannot_be_computed_in_chunks_are_refused(make_model: Any, batch: Any) -> None:
    model = make_model()
    with pytest.raises(ValueError, match="loss_chunk_size=0 must be at least 1"):
        model(**batch, loss_chunk_size=0)
    with pytest.raises(ValueError, match=r"labels of shape \(2, 10\) do not fit an input of shape \(2, 11\)"):
        model(batch["input_ids"], labels=batch["labels"][:, 1:], loss_chunk_size=4)
    batch["labels"][0, 5] = VOCABULARY
    with pytest.raises(ValueError, match=r"labels\[0, 5\] = 99"):
        model(**batch, loss_chunk_size=4)
    model.loss_function = lambda logits, labels, vocab_size: logits.sum()
    batch["labels"][0, 5] = 1
    assert model(**batch).loss.ndim == 0
    with pytest.raises(ValueError, match=r"loss_chunk_size=4 .*loss_function.*None"):
        model(**batch, loss_chunk_size=4)


IGNORED: dict[str, tuple[str, Callable[[Tensor], dict[str, Tensor]]]] = {
    "causal": ("ForCausalLM", lambda ids: {"labels": torch.full_like(ids, -100)}),
    "first label only": (
        "ForCausalLM",
        lambda ids: {"labels": torch.full_like(ids, -100).index_fill(1, torch.tensor([0]), 5)},
    ),
    "tokens": ("ForTokenClassification", lambda ids: {"labels": torch.full_like(ids, -100)}),
    "sequences": ("ForSequenceClassification", lambda ids: {"labels": torch.full_like(ids[:, 0], -100)}),
    "answers": (
        "ForQuestionAnswering",
        lambda ids: {
            "start_positions": torch.full_like(ids[:, 0], 99),
            "end_positions": torch.full_like(ids[:, 0], -1),
        },
    ),
}


@pytest.mark.parametrize("keywords", [{}, {"num_items_in_batch": torch.tensor(0)}, {"num_items_in_batch": 0}], ids=str)
@pytest.mark.parametrize("problem", [*IGNORED, "chunks", "chunks of a hooked head"])
def test_a_batch_of_ignored_labels_has_zero_loss_and_gradients_and_warns(
    problem: str, keywords: dict[str, Any], make_model: Any, token_ids: Any
) -> None:
    """Every parameter that a label would train gets a zero gradient."""
    name, labels = IGNORED.get(problem, IGNORED["causal"])
    model = make_model(name, num_labels=4).train()
    if problem.startswith("chunks"):
        model.config.loss_chunk_size = 4
        HEADS["hooked" if "hooked" in problem else "plain"](model)
    ids = token_ids(2, 9)
    with pytest.warns(UserWarning, match=r"All labels of a batch are ignored \(-100\): its loss is 0"):
        loss = model(ids, **labels(ids), **keywords).loss
    loss.backward()
    assert loss.item() == 0
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


@pytest.fixture
def warnings_are_errors() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.usefixtures("warnings_are_errors")
def test_one_label_that_counts_gives_no_warning(make_model: Any, token_ids: Any) -> None:
    ids = token_ids(2, 9)
    labels = torch.full_like(ids, -100)
    labels[1, 3] = 7
    for chunk in (None, 4):
        output = make_model()(ids, labels=labels, loss_chunk_size=chunk)
        assert output.loss > 0
    expected = cross_entropy(make_model()(ids).logits[1, 2], torch.tensor(7))
    torch.testing.assert_close(output.loss, expected, **TIGHT)
