"""On a GPU: FlashAttention-2 against eager attention, CUDA graphs of decoding steps, and steps that never wait."""

import copy
import gc
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import DataCollatorWithFlattening

from mistral_hf import RollingCache
from mistral_hf.torch import flash_kernels

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]

NAME = "flash_attention_2"
FREE: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "max_new_tokens": 24}
DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
WINDOWS = pytest.mark.parametrize("window", [None, 1, 8, 100])
IMPLEMENTATIONS = pytest.mark.parametrize("implementation", ["eager", "sdpa", NAME])


@pytest.fixture(params=["package", "torch"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The kernels of the package and of PyTorch, if they are installed."""
    if request.param == "package":
        try:
            version("flash_attn")
        except PackageNotFoundError:
            pytest.skip("flash_attn is not installed")
        found = flash_kernels._package_kernels()
    else:
        found = flash_kernels._torch_kernels()
        if found is None:
            pytest.skip("this PyTorch has no kernels")
    monkeypatch.setattr(flash_kernels, "_kernels", found)
    return found


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch.compiler.reset()
    counters.clear()


@pytest.fixture
def trio(make_model: Any) -> Any:
    """Builds a flash and an eager model of a dtype, and a float32 model with the same rounded weights."""

    def make(dtype: torch.dtype, **overrides: Any) -> SimpleNamespace:
        eager = make_model("ForCausalLM", "eager", **{"head_dim": 16, **overrides}).to("cuda", dtype)
        flash = copy.deepcopy(eager)
        flash.set_attn_implementation(NAME)
        return SimpleNamespace(flash=flash, eager=eager, truth=copy.deepcopy(eager).float())

    return make


def on_gpu(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.to("cuda") for name, tensor in inputs.items()}


def assert_as_close(flash: Tensor, eager: Tensor, truth: Tensor) -> None:
    """Flash attention is about as far from the float32 result as eager attention of the same dtype."""
    scale = truth.norm()
    assert flash.isfinite().all()
    assert (flash.float() - truth).norm() / scale <= 1.5 * (eager.float() - truth).norm() / scale + 1e-3


@DTYPES
@WINDOWS
@pytest.mark.parametrize("side", [None, "left", "right"])
def test_forward_and_backward_are_as_close_as_eager(
    side: str | None, window: int | None, dtype: torch.dtype, kernels: Any, trio: Any, padded: Any
) -> None:
    models = trio(dtype, sliding_window=window)
    inputs = on_gpu(padded(70, 41, 2, side=side or "left") if side else padded(70, 70, 70))
    results: dict[str, tuple[Tensor, Tensor]] = {}
    for name, model in vars(models).items():
        logits = model.train()(**inputs).logits.float() * inputs["attention_mask"][..., None]
        logits.square().mean().backward()
        gradients = torch.cat([weight.grad.float().flatten() for weight in model.parameters()])
        results[name] = (logits.detach(), gradients)
    for flash, eager, truth in zip(results["flash"], results["eager"], results["truth"], strict=True):
        assert_as_close(flash, eager, truth)


@DTYPES
@pytest.mark.parametrize("positions", [False, True])
def test_packed_sequences_are_as_close_as_eager(
    positions: bool, dtype: torch.dtype, kernels: Any, trio: Any, token_ids: Any
) -> None:
    models = trio(dtype)
    features = [{"input_ids": token_ids(1, count)[0].tolist()} for count in (40, 1, 13)]
    batch = on_gpu_but_numbers(
        DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_position_ids=positions)(features)
    )
    found = models.flash(**batch).logits
    eager, truth = (
        torch.cat([model(torch.tensor([f["input_ids"]], device="cuda")).logits for f in features], dim=1)
        for model in (models.eager, models.truth)
    )
    assert_as_close(found, eager, truth)


def on_gpu_but_numbers(batch: dict[str, Any]) -> dict[str, Any]:
    return {name: value.to("cuda") if isinstance(value, Tensor) else value for name, value in batch.items()}


@DTYPES
@WINDOWS
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("lengths", [(30, 30), (30, 9)])
def test_chunks_and_steps_across_the_wrap_are_as_close_as_eager(
    lengths: tuple[int, int], static: bool, window: int | None, dtype: torch.dtype, kernels: Any, trio: Any, padded: Any
) -> None:
    models = trio(dtype, sliding_window=window)
    inputs = on_gpu(padded(*lengths))
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    results = []
    with torch.no_grad():
        for model in vars(models).values():
            cache = RollingCache(model.config, max_cache_len=64 if static else None)
            bounds = [0, 6, 15, *range(16, 31)]
            pieces = [
                model(ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache).logits
                for start, end in pairwise(bounds)
            ]
            results.append(torch.cat(pieces, dim=1) * mask[..., None])
    assert_as_close(*results)


@IMPLEMENTATIONS
@pytest.mark.parametrize("lengths", [(30, 30), (30, 9)])
def test_no_step_waits_for_the_gpu(implementation: str, lengths: tuple[int, int], make_model: Any, padded: Any) -> None:
    """CUDA's debug mode raises at the first synchronisation; the step also reads the mask."""
    model = make_model("ForCausalLM", implementation, head_dim=16).to("cuda", torch.bfloat16)
    inputs = on_gpu(padded(*lengths))
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    cache = RollingCache(model.config)
    with torch.no_grad():
        model(ids[:, :20], attention_mask=mask[:, :20], past_key_values=cache)
        for end in range(21, 24):  # the first steps may load kernels
            model(ids[:, end - 1 : end], attention_mask=mask[:, :end], past_key_values=cache)
        torch.cuda.set_sync_debug_mode("error")
        try:
            for end in range(24, 31):
                model(ids[:, end - 1 : end], attention_mask=mask[:, :end], past_key_values=cache)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_liger_kernels_do_not_change_loss_and_gradients(make_model: Any, padded: Any) -> None:
    """With the kernels that ``TrainingArguments(use_liger_kernel=True)`` puts into a model."""
    liger = pytest.importorskip("liger_kernel.transformers")
    model = make_model("ForCausalLM", head_dim=16).to("cuda").train()
    inputs = on_gpu(padded(30, 9, side="right"))
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    results = []
    for fused in (False, True):
        if fused:
            liger._apply_liger_kernel_to_instance(model=model)
        loss = model(**inputs, labels=labels).loss
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        results.append(torch.cat([loss.view(1), *(gradient.flatten() for gradient in gradients)]))
    torch.testing.assert_close(results[1], results[0], rtol=1e-3, atol=1e-4)


@IMPLEMENTATIONS
@pytest.mark.parametrize("padding", [False, True])
def test_the_static_step_is_one_cuda_graph(implementation: str, padding: bool, make_model: Any, padded: Any) -> None:
    """It is traced once and completely, and gives the same logits before, at and after the wrap."""
    model = make_model("ForCausalLM", implementation, head_dim=16, sliding_window=64).to("cuda", torch.bfloat16)
    step = torch.compile(model.forward, mode="reduce-overhead", fullgraph=True)
    for prompt in (30, 40):
        inputs = on_gpu(padded(100, 80 if padding else 100))
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        caches = RollingCache(model.config, max_cache_len=128), RollingCache(model.config)
        with torch.no_grad():
            for cache in caches:
                model(ids[:, :prompt], attention_mask=mask[:, :prompt], past_key_values=cache)
            for end in range(prompt + 1, 101):
                plan = model.create_masks_for_generate(
                    model.config,
                    torch.empty(2, 1, 0, device="cuda", dtype=model.dtype),
                    mask[:, :end] if padding else None,
                    caches[0],
                )
                positions = (mask[:, :end].sum(dim=-1, keepdim=True) - 1).clamp(min=0)
                token = ids[:, end - 1 : end]
                torch.compiler.cudagraph_mark_step_begin()
                found = step(token, attention_mask=plan, position_ids=positions, past_key_values=caches[0]).logits
                expected = model(token, attention_mask=mask[:, :end], past_key_values=caches[1]).logits
                torch.testing.assert_close(found, expected, rtol=5e-2, atol=1e-1)
    assert counters["stats"]["unique_graphs"] == 1
    assert counters["inductor"]["cudagraph_skips"] == 0


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_generate_runs_static_steps_as_one_graph(implementation: str, make_model: Any, padded: Any) -> None:
    """In float32, where all tokens must be equal; calls of other lengths share the graph."""
    model = make_model("ForCausalLM", implementation, sliding_window=8).to("cuda")
    model.generate(
        **on_gpu(padded(30, 4)), cache_implementation="static", **FREE
    )  # the largest cache first, so the others fit its graph
    graphs = counters["stats"]["unique_graphs"]
    for lengths in ((11, 4), (5, 5), (25, 7)):
        inputs = on_gpu(padded(*lengths))
        expected = model.generate(**inputs, **FREE)
        assert torch.equal(model.generate(**inputs, cache_implementation="static", **FREE), expected)
    assert counters["stats"]["unique_graphs"] == graphs == 1
    assert counters["inductor"]["cudagraph_skips"] == 0


def test_generate_with_flash_and_a_static_cache_is_as_close_as_eager(kernels: Any, trio: Any, padded: Any) -> None:
    """The logits of compiled steps, and of the whole text without a compiler."""
    models = trio(torch.bfloat16)
    inputs = on_gpu(padded(20, 9))
    wanted = {"return_dict_in_generate": True, "output_logits": True, **FREE}
    static = models.flash.generate(**inputs, cache_implementation="static", **wanted)
    ids = static.sequences
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 24), value=1)
    with torch.no_grad():
        flash, eager, truth = (model(ids, attention_mask=mask).logits[:, 19:-1] for model in vars(models).values())
    assert_as_close(torch.stack(static.logits, dim=1), eager, truth)
    assert_as_close(flash, eager, truth)


def test_right_padding_is_refused(kernels: Any, trio: Any, padded: Any) -> None:
    with pytest.raises(ValueError, match=r'set tokenizer\.padding_side = "left"'):
        trio(torch.bfloat16).flash.generate(**on_gpu(padded(20, 9, side="right")), **FREE)


def test_a_checkpoint_loads_onto_the_gpu_with_flash_attention(make_model: Any, tmp_path: Any) -> None:
    reference = make_model("ForCausalLM", "sdpa", head_dim=16)
    reference.save_pretrained(tmp_path)
    options = {"dtype": "bfloat16", "device_map": "cuda", "attn_implementation": NAME}
    model = type(reference).from_pretrained(tmp_path, **options)
    assert model.config._attn_implementation == NAME
    assert model(torch.ones(1, 9, dtype=torch.long, device="cuda")).logits.isfinite().all()


@pytest.mark.parametrize("implementation", ["sdpa", NAME])
def test_a_prompt_in_pieces_takes_no_more_memory_than_a_short_one(
    implementation: str, make_model: Any, token_ids: Any
) -> None:
    model = make_model("ForCausalLM", implementation, head_dim=64, sliding_window=256).to("cuda", torch.bfloat16)
    peaks = []
    for length in (2048, 2048, 16384):
        ids = token_ids(1, length).to("cuda")
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        model.generate(ids, attention_mask=torch.ones_like(ids), prefill_chunk_size=256, max_new_tokens=1)
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[2] <= peaks[1] + 64 * 16384  # ids, positions and masks
