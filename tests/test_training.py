"""Training with Trainer, PEFT and the collators of TRL."""

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DataCollatorWithFlattening, Trainer, TrainerCallback, TrainingArguments
from transformers.models.mistral import modeling_mistral as stock_modeling

import mistral_hf

TIGHT = {"rtol": 1e-5, "atol": 1e-5}
LENGTHS = (7, 12, 3)


@pytest.fixture
def sequences(token_ids: Any) -> list[dict[str, list[int]]]:
    """Three texts of different lengths; the first token of each is not a label."""
    rows = [token_ids(1, length, seed=length)[0].tolist() for length in LENGTHS]
    return [{"input_ids": row, "labels": [-100, *row[1:]]} for row in rows]


def loss_and_gradients(model: Any, *batches: dict[str, Any], **keywords: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """The sum of the losses of all batches, and its gradients by name."""
    model.zero_grad()
    loss = torch.stack([model(**batch, **keywords).loss for batch in batches]).sum()
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def assert_same(found: Any, expected: Any, **tolerance: float) -> None:
    torch.testing.assert_close(found[0], expected[0], **(tolerance or TIGHT))
    for name, gradient in expected[1].items():
        message = lambda text, name=name: f"{name}: {text}"  # noqa: E731
        torch.testing.assert_close(found[1][name], gradient, **(tolerance or TIGHT), msg=message)


def apart(sequences: list[dict[str, list[int]]]) -> list[dict[str, Tensor]]:
    return [{name: torch.tensor([values]) for name, values in row.items()} for row in sequences]


def flattened(sequences: Any) -> dict[str, Any]:
    return DataCollatorWithFlattening()(sequences)


def flattened_for_kernels(sequences: Any) -> dict[str, Any]:
    collator = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)
    return collator([dict(row) for row in sequences])


def padding_free(sequences: Any) -> dict[str, Any]:
    sft = pytest.importorskip("trl.trainer.sft_trainer")
    return sft.DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)(sequences)


def packed(sequences: Any) -> dict[str, Any]:
    """As TRL packs rows: one long row with the lengths of its sequences."""
    sft = pytest.importorskip("trl.trainer.sft_trainer")
    ids = [token for row in sequences for token in row["input_ids"]]
    row = {"input_ids": ids, "seq_lengths": [len(row["input_ids"]) for row in sequences]}
    return sft.DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)([row])


def unmasked(sequences: Any) -> dict[str, Any]:
    """A collator that does not mask the labels at the starts of sequences."""
    batch = flattened(sequences)
    return batch | {"labels": batch["input_ids"].clone()}


COLLATORS = {
    "flattened": flattened,
    "flattened for kernels": flattened_for_kernels,
    "padding-free": padding_free,
    "packed": packed,
    "unmasked": unmasked,
}


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("chunk", [None, 5])
@pytest.mark.parametrize("collator", COLLATORS)
def test_packed_sequences_train_as_if_alone(
    collator: str, chunk: int | None, implementation: str, make_model: Any, sequences: Any
) -> None:
    model = make_model(implementation=implementation, loss_chunk_size=chunk).train()
    count = sum(LENGTHS) - len(LENGTHS)
    expected = loss_and_gradients(model, *apart(sequences), num_items_in_batch=count)
    batch = COLLATORS[collator](sequences)
    assert batch["input_ids"].shape == (1, sum(LENGTHS))
    assert_same(loss_and_gradients(model, batch, num_items_in_batch=count), expected)
    assert_same(loss_and_gradients(model, batch), expected)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_long_packed_sequences_train_as_if_alone(implementation: str, make_model: Any, token_ids: Any) -> None:
    """Longer than a block of banded attention, with boundaries inside blocks and windows."""
    model = make_model(implementation=implementation, sliding_window=40).train()
    rows = [{"input_ids": token_ids(1, length, seed=length)[0].tolist()} for length in (301, 17, 250, 33)]
    batch = flattened(rows)
    singles = apart([{**row, "labels": row["input_ids"]} for row in rows])
    expected = loss_and_gradients(model, *singles, num_items_in_batch=597)
    assert_same(loss_and_gradients(model, batch), expected)


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


def wrong_mask(sequences: Any) -> dict[str, Any]:
    batch = flattened(sequences)
    return batch | {"attention_mask": torch.ones_like(batch["input_ids"])}


def wrong_mask_with_padding(sequences: Any) -> dict[str, Any]:
    """Padding between two sequences does not separate them."""
    batch = wrong_mask(sequences)
    batch["attention_mask"][:, LENGTHS[0]] = 0
    return batch


def wrong_trl_collator(sequences: Any) -> dict[str, Any]:
    sft = pytest.importorskip("trl.trainer.sft_trainer")
    ids = [token for row in sequences for token in row["input_ids"]]
    row = {"input_ids": ids, "seq_lengths": [len(row["input_ids"]) for row in sequences]}
    return sft.DataCollatorForLanguageModeling(pad_token_id=0, return_position_ids=True)([row])


@pytest.mark.parametrize("collate", [wrong_mask, wrong_mask_with_padding, wrong_trl_collator])
def test_a_mask_that_lets_packed_sequences_see_each_other_is_refused(
    collate: Any, make_model: Any, sequences: Any
) -> None:
    batch = collate(sequences)
    with pytest.raises(ValueError, match=r"position_ids\[0, [78]\] restarts at [01].*without an attention_mask"):
        make_model()(**batch)


@pytest.mark.parametrize("keyword", ["return_flash_attn_kwargs", "return_seq_idx"])
def test_packing_without_positions_is_refused(keyword: str, make_model: Any, sequences: Any) -> None:
    batch = DataCollatorWithFlattening(return_position_ids=False, **{keyword: True})([dict(row) for row in sequences])
    with pytest.raises(ValueError, match=r"marks packed sequences.*return_position_ids=True"):
        make_model()(**batch)


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


class Losses(TrainerCallback):
    """The logged losses."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.values += [logs["loss"]] if "loss" in logs else []


def train(model: Any, data: Any, folder: Path, collator: Any = None, resume: Any = None, **options: Any) -> Any:
    """The logged losses of a short run with Trainer, and the final weights."""
    defaults = {
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
    assert_same((torch.zeros(0), found[1]), (torch.zeros(0), expected[1]), rtol=1e-4, atol=1e-5)
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
    assert_same(loss_and_gradients(model, batch, use_cache=use_cache), expected)
    assert_same(
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


@pytest.mark.parametrize("chunk", [None, 5])
def test_compiled_training_matches_eager_training(
    chunk: int | None, make_model: Any, rows: Any, tmp_path: Path
) -> None:
    torch._dynamo.reset()
    expected = train(make_model(loss_chunk_size=chunk), rows, tmp_path, max_steps=2)
    options = {"torch_compile": True, "torch_compile_backend": "aot_eager", "max_steps": 2}
    found = train(make_model(loss_chunk_size=chunk), rows, tmp_path, **options)
    torch._dynamo.reset()
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
    assert_same((torch.zeros(0), packed[1]), (torch.zeros(0), single[1]))


def test_accumulated_answers_match_the_large_batch(make_model: Any, token_ids: Any, tmp_path: Path) -> None:
    ids = token_ids(6, 12)
    data = [{"input_ids": row, "start_positions": index, "end_positions": index + 2} for index, row in enumerate(ids)]
    options = {"optim": "sgd", "learning_rate": 0.1, "max_steps": 1}
    large = train(make_model("ForQuestionAnswering"), data, tmp_path, per_device_train_batch_size=6, **options)
    small = train(make_model("ForQuestionAnswering"), data, tmp_path, gradient_accumulation_steps=3, **options)
    assert small[0] == pytest.approx(large[0], rel=1e-5)
    assert_same((torch.zeros(0), small[1]), (torch.zeros(0), large[1]))


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
    """It can also be switched off, and loads from a folder that holds only the adapter."""
    ids, base = token_ids(1, 9), tmp_path / "base"
    make_model().save_pretrained(base)
    expected = trained_adapter(peft, AutoModelForCausalLM.from_pretrained(base), ids, tmp_path / "adapter")
    model = make_model()
    plain = model(ids).logits
    model.load_adapter(str(tmp_path / "adapter"))
    torch.testing.assert_close(model(ids).logits, expected, **TIGHT)
    model.disable_adapters()
    torch.testing.assert_close(model(ids).logits, plain, **TIGHT)
    both = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert isinstance(both, mistral_hf.MistralForCausalLM)
    torch.testing.assert_close(both(ids).logits, expected, **TIGHT)


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
