"""Training with Trainer."""

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.models.mistral import modeling_mistral as stock_modeling

from tests.helpers.comparison import assert_same_tensors, loss_and_gradients
from tests.helpers.packing import apart, flattened


class Losses(TrainerCallback):
    """The logged losses."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.values += [logs["loss"]] if "loss" in logs else []


def train(model: Any, data: Any, folder: Path, collator: Any = None, resume: Any = None, **options: Any) -> Any:
    """The logged losses of a short run with Trainer, and the final weights."""
    defaults: dict[str, Any] = {
        "per_device_train_batch_size": 2,
        "max_steps": 4,
        "learning_rate": 0.01,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0,
        "logging_steps": 1,
        "save_strategy": "no",
        "train_sampling_strategy": "sequential",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    losses = Losses()
    arguments = TrainingArguments(output_dir=str(folder), **(defaults | options))
    trainer = Trainer(model, arguments, train_dataset=data, data_collator=collator, callbacks=[losses])
    trainer.train(resume_from_checkpoint=resume)
    return losses.values, {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


@pytest.fixture
def rows(token_ids: Any) -> list[dict[str, Tensor]]:
    ids = token_ids(8, 12)
    return [
        {"input_ids": row, "labels": row.masked_fill(torch.arange(12) < index, -100)} for index, row in enumerate(ids)
    ]


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "checkpointing": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    "reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    "accumulated": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2},
    "with a cache": {"use_cache": True},
}


@pytest.mark.parametrize("chunk", [None, 5])
@pytest.mark.parametrize("options", OPTIONS)
def test_trainer_moves_the_weights_as_in_the_reference(
    options: str, chunk: int | None, make_pair: Any, rows: Any, tmp_path: Path
) -> None:
    """Four optimiser steps, with options that save memory, against the reference without them."""
    pair = make_pair(loss_chunk_size=chunk, tie_word_embeddings=True)
    before = {name: p.detach().clone() for name, p in pair.ours.named_parameters()}
    expected = train(pair.stock, rows, tmp_path, optim="sgd")
    found = train(pair.ours, rows, tmp_path, optim="sgd", **OPTIONS[options])
    assert found[0] == pytest.approx(expected[0], rel=1e-4)
    assert_same_tensors(found[1], expected[1], rtol=1e-4, atol=1e-5)
    assert max((found[1][name] - before[name]).abs().max() for name in before) > 1e-2


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("use_cache", [True, False, None])
def test_gradient_checkpointing_ignores_cache_arguments(
    use_cache: bool | None, use_reentrant: bool, make_model: Any, sequences: Any
) -> None:
    model = make_model().train()
    batch = apart(sequences)[1]
    expected = loss_and_gradients(model, batch)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    assert_same_tensors(loss_and_gradients(model, batch, use_cache=use_cache), expected)
    assert_same_tensors(
        loss_and_gradients(model, batch, use_cache=use_cache, past_key_values=None, loss_chunk_size=5), expected
    )
    assert model(**batch, use_cache=True).past_key_values is None


def test_mixed_precision_keeps_float32_weights_and_nearly_the_same_losses(
    make_model: Any, rows: Any, tmp_path: Path
) -> None:
    exact, _ = train(make_model(), rows, tmp_path)
    for chunk in (None, 5):
        losses, weights = train(make_model(loss_chunk_size=chunk), rows, tmp_path, bf16=True)
        assert losses == pytest.approx(exact, rel=0.02)
        assert losses != exact
        assert {weight.dtype for weight in weights.values()} == {torch.float32}


def test_resumed_training_matches_uninterrupted_training(make_model: Any, rows: Any, tmp_path: Path) -> None:
    whole = train(make_model(), rows, tmp_path / "whole")
    train(make_model(), rows, tmp_path / "parts", save_strategy="steps", save_steps=2)
    resumed = train(make_model(seed=1), rows, tmp_path / "parts", resume=str(tmp_path / "parts/checkpoint-2"))
    assert resumed[0] == pytest.approx(whole[0][2:], rel=1e-6)
    for name, weight in whole[1].items():
        assert torch.equal(resumed[1][name], weight), name
    saved = json.loads((tmp_path / "parts/checkpoint-2/config.json").read_text())
    assert saved["model_type"] == "mistral"
    stock_modeling.MistralForCausalLM.from_pretrained(tmp_path / "parts/checkpoint-2")


def test_neftune_adds_noise_and_leaves_no_hook(make_model: Any, rows: Any, tmp_path: Path) -> None:
    """Embeddings are noisy in training, and the hook that adds the noise is removed."""
    plain, _ = train(make_model(), rows, tmp_path)
    model = make_model()
    noisy, _ = train(model, rows, tmp_path, neftune_noise_alpha=5)
    assert noisy[0] != plain[0]
    assert noisy[0] == pytest.approx(plain[0], rel=0.5)
    assert not model.get_input_embeddings()._forward_hooks


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("chunk", [None, 5])
def test_compiled_training_matches_eager_training(
    chunk: int | None, make_model: Any, rows: Any, tmp_path: Path
) -> None:
    expected = train(make_model(loss_chunk_size=chunk), rows, tmp_path, max_steps=2)
    options = {"torch_compile": True, "torch_compile_backend": "aot_eager", "max_steps": 2}
    found = train(make_model(loss_chunk_size=chunk), rows, tmp_path, **options)
    assert found[0] == pytest.approx(expected[0], rel=1e-4)


def test_packed_training_matches_training_on_single_sequences(make_model: Any, sequences: Any, tmp_path: Path) -> None:
    """One packed batch a step, against the same sequences one by one with accumulated gradients."""
    data = sequences * 2
    options = {"optim": "sgd", "max_steps": 2}
    packed = train(
        make_model(), data, tmp_path, flattened, per_device_train_batch_size=3, remove_unused_columns=False, **options
    )
    single = train(
        make_model(), data, tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=3, **options
    )
    assert packed[0] == pytest.approx(single[0], rel=1e-5)
    assert_same_tensors(packed[1], single[1])


def test_accumulated_answers_match_the_large_batch(make_model: Any, token_ids: Any, tmp_path: Path) -> None:
    ids = token_ids(6, 12)
    data = [{"input_ids": row, "start_positions": index, "end_positions": index + 2} for index, row in enumerate(ids)]
    options = {"optim": "sgd", "learning_rate": 0.1, "max_steps": 1}
    large = train(make_model("ForQuestionAnswering"), data, tmp_path, per_device_train_batch_size=6, **options)
    small = train(make_model("ForQuestionAnswering"), data, tmp_path, gradient_accumulation_steps=3, **options)
    assert small[0] == pytest.approx(large[0], rel=1e-5)
    assert_same_tensors(small[1], large[1])


def test_label_smoothing_matches_the_trainer(make_model: Any, rows: Any, tmp_path: Path) -> None:
    """Trainer's needs all logits; the configuration's gives the same loss without them."""
    expected = train(make_model(), rows, tmp_path, label_smoothing_factor=0.1)
    found = train(make_model(loss_chunk_size=5, label_smoothing=0.1), rows, tmp_path)
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    with pytest.warns(UserWarning, match="loss_chunk_size=5 has no effect"):
        train(make_model(loss_chunk_size=5), rows, tmp_path, label_smoothing_factor=0.1, max_steps=1)


def test_evaluation_in_chunks_gives_the_same_loss(make_model: Any, rows: Any, tmp_path: Path) -> None:
    losses = []
    for chunk in (None, 5):
        arguments = TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True, disable_tqdm=True)
        losses.append(Trainer(make_model(loss_chunk_size=chunk), arguments, eval_dataset=rows).evaluate()["eval_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_the_benchmark_runs_and_its_versions_agree(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In tiny sizes, whose times mean nothing; a second run keeps the results of the first."""
    pytest.importorskip("bitsandbytes")
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1]))
    training = import_module("benchmarks.training")
    output = ["--tiny", "--output", str(tmp_path / "found.json"), "--cases"]
    names = [case.name for case in training.CASES]
    training.main([*output, *names])
    monkeypatch.setattr(training, "FORMATS", {name: training.FORMATS[name] for name in ("bfloat16", "nf4")})
    training.main([*output, training.QUANTIZATION])
    found = json.loads((tmp_path / "found.json").read_text())
    assert list(found["cases"]) == names
    assert all(case["largest_relative_difference"] < 1e-4 for case in found["cases"].values())
    sizes = {name: record["bytes_of_32_layers"] for name, record in found["quantization"].items()}
    assert sizes["nf4"] < sizes["bfloat16"]
