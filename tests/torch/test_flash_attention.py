"""FlashAttention-2 through stand-in kernels matches eager attention, and refuses inputs that it cannot handle.

Masks are compared in float32, which the stand-ins accept only with the fixture `exact`: differences then come from the
masks, not from rounding.
"""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from transformers import BitsAndBytesConfig, DataCollatorWithFlattening, DynamicCache, StaticCache

from mistral_hf import MistralForCausalLM, RollingCache
from mistral_hf.torch import tracing
from mistral_hf.torch.attention import ALL_ATTENTION_FUNCTIONS, make_mask
from mistral_hf.torch.flash_kernels import PackageKernels, TorchKernels, VarlenPlan
from mistral_hf.torch.sequence_layout import KeyLayout
from tests.helpers import fake_flash_kernels as standin
from tests.helpers.family import FAMILY
from tests.helpers.flash_attention import KERNELS, NAME, OLD_PACKAGE, shapes_only, use
from tests.helpers.layouts import layout_of

WINDOWS = pytest.mark.parametrize("window", [None, 1, 2, 8, 100])


@pytest.fixture
def pair(make_model: Any) -> Any:
    """Builds a flash model and an eager one with the same weights."""

    def make(**overrides: Any) -> tuple[Any, Any]:
        overrides = {"head_dim": 16, **overrides}
        return make_model("ForCausalLM", NAME, **overrides), make_model("ForCausalLM", "eager", **overrides)

    return make


def padding(side: str, length: int) -> Tensor:
    """Masks of a row with all tokens, one with little padding and one with much, ``[3, length]``."""
    indices = torch.arange(length).expand(3, -1)
    counts = torch.tensor([[length], [length - 5], [2]])
    if side == "both":
        return ((indices >= 2) & (indices < counts + (counts == 2))).long()
    return (indices >= length - counts if side == "left" else indices < counts).long()


def assert_same(found: Tensor, expected: Tensor, real: Tensor | None = None) -> None:
    """Logits ``[B, S, V]`` are close, where the tokens ``[B, S]`` are real."""
    if real is not None:
        found, expected = found * real[..., None], expected * real[..., None]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=5e-5)


@WINDOWS
@pytest.mark.parametrize("side", ["none", "left", "right", "both"])
@FAMILY
def test_forward_and_backward_match_eager_attention(
    side: str, window: int | None, kernels: Any, exact: None, pair: Any
) -> None:
    """With any padding, without a cache and with the one that `forward` makes."""
    ids = torch.randint(1, 99, (3, 19))
    mask = None if side == "none" else padding(side, 19)
    real = torch.ones(3, 19) if mask is None else mask
    gradients = []
    for model in pair(sliding_window=window):
        logits = model.train()(ids, attention_mask=mask).logits * real[..., None]
        logits.square().mean().backward()
        gradients.append((logits, {name: weight.grad for name, weight in model.named_parameters()}))
    assert_same(gradients[0][0], gradients[1][0])
    for name, gradient in gradients[0][1].items():
        torch.testing.assert_close(gradient, gradients[1][1][name], rtol=1e-3, atol=1e-5)


PACKED = {
    "positions": {},
    "bounds": {"return_flash_attn_kwargs": True, "return_position_ids": False},
    "both": {"return_flash_attn_kwargs": True},
    "numbers": {"return_seq_idx": True, "return_position_ids": False},
}


@pytest.mark.parametrize("how", PACKED)
@WINDOWS
@FAMILY
def test_packed_sequences_are_computed_as_if_alone(
    how: str, window: int | None, kernels: Any, exact: None, pair: Any
) -> None:
    """Sequences of the flattening collator have the same logits as alone, and all weights get gradients."""
    features = [{"input_ids": torch.randint(1, 99, (count,)).tolist()} for count in (9, 1, 13)]
    batch = DataCollatorWithFlattening(**PACKED[how])(features)
    batch["labels"] = batch["input_ids"].clone()  # a label at the start of a sequence is ignored too
    ours, eager = pair(sliding_window=window)
    output = ours(**batch)
    singles = [torch.tensor([feature["input_ids"]]) for feature in features if len(feature["input_ids"]) > 1]
    losses = [eager(row, labels=row, num_items_in_batch=1).loss for row in singles]
    torch.testing.assert_close(output.loss, torch.stack(losses).sum() / 20)
    alone = [eager(torch.tensor([feature["input_ids"]])).logits for feature in features]
    assert_same(output.logits, torch.cat(alone, dim=1))
    output.loss.backward()
    assert all(weight.grad is not None for weight in ours.parameters())


@pytest.mark.parametrize("length", [19, 300])
def test_a_label_predicted_from_padding_gives_one_loss(
    length: int, kernels: Any, exact: None, pair: Any, make_pair: Any
) -> None:
    """The first token of a left-padded row is predicted by padding, which sees no key: that of the reference's sdpa."""
    mask, ids = padding("left", length), torch.randint(1, 99, (3, length))
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    models = [*pair(), *make_pair("ForCausalLM", "sdpa", head_dim=16)]
    first, *others = [model(**inputs, position_ids=(mask.cumsum(-1) - 1).clamp(min=0)).loss for model in models]
    for loss in others:
        torch.testing.assert_close(loss, first, rtol=1e-5, atol=0)


def test_bounds_of_packed_sequences_need_a_single_row(kernels: Any, exact: None, pair: Any) -> None:
    bounds = torch.tensor([0, 3, 6], dtype=torch.int32)
    with pytest.raises(ValueError, match="one row, but there are 2 rows"):
        pair()[0](torch.ones(2, 6, dtype=torch.long), cu_seq_lens_q=bounds)


GENERATION = {
    "dynamic": {},
    "static": {"cache_implementation": "static"},
    "chunks": {"prefill_chunk_size": 3},
    "chunks of one": {"prefill_chunk_size": 1},
    "static chunks": {"cache_implementation": "static", "prefill_chunk_size": 3},
    "beams": {"num_beams": 3},
    "static beams": {"cache_implementation": "static", "num_beams": 3},
    "assisted": {"prompt_lookup_num_tokens": 3},
}


@pytest.mark.parametrize("window", [None, 1, 8])
@pytest.mark.parametrize("how", GENERATION)
@FAMILY
def test_generation_across_the_wrap_matches_eager_attention(
    how: str, window: int | None, kernels: Any, exact: None, pair: Any
) -> None:
    """The tokens are equal, greedily or with beams, left-padded or not."""
    ours, eager = pair(sliding_window=window)
    ids = torch.randint(1, 99, (3, 17))
    masks = [padding("left", 17), torch.ones_like(ids)]
    if how == "assisted":
        ids, masks = ids[:1].repeat(1, 2), [torch.ones(1, 34, dtype=torch.long)]
    options = {"max_new_tokens": 14, "do_sample": False, "eos_token_id": None, **GENERATION[how]}
    for mask in masks:
        assert torch.equal(
            ours.generate(ids, attention_mask=mask, **options), eager.generate(ids, attention_mask=mask, **options)
        )


@pytest.mark.parametrize("make", [DynamicCache, StaticCache, RollingCache])
@pytest.mark.parametrize("side", ["left", "none"])
@pytest.mark.parametrize("counts", [(4, 7, 1, 1, 2, 1), (1, 1, 20, 1, 1)])
@FAMILY
def test_steps_and_chunks_with_any_cache_match_eager_attention(
    make: Any, side: str, counts: tuple[int, ...], kernels: Any, exact: None, pair: Any
) -> None:
    """Logits of every call, also with the library's caches, which hold more than the window."""
    for window in (None, 3, 8):
        ours, eager = pair(sliding_window=window)
        ids = torch.randint(1, 99, (3, sum(counts)))
        mask = padding("left", 15)[:, : ids.shape[1]] if side == "left" else torch.ones(3, 0, dtype=torch.long)
        mask = torch.nn.functional.pad(mask, (0, ids.shape[1] - mask.shape[1]), value=1)
        expected = eager(ids, attention_mask=mask, use_cache=False).logits
        cache = make(config=ours.config, **({"max_cache_len": 40} if make is StaticCache else {}))
        start = 0
        for count in counts:
            end = start + count
            with torch.no_grad():
                logits = ours(ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache).logits
            assert_same(logits, expected[:, start:end], mask[:, start:end])
            start = end


@pytest.mark.parametrize("window", [None, 4])
def test_a_step_with_gradients_matches_eager_attention(
    window: int | None, kernels: Any, exact: None, pair: Any
) -> None:
    """The decoding functions of the kernels have no backward pass, so others are used."""
    ours, eager = pair(sliding_window=window)
    ids = torch.randint(1, 99, (3, 12))
    gradients = []
    for model in (ours, eager):
        cache = RollingCache(model.config)
        for start, end in ((0, 9), (9, 10), (10, 11), (11, 12)):
            logits = model(ids[:, start:end], past_key_values=cache, attention_mask=padding("left", 12)[:, :end]).logits
        logits.sum().backward()
        gradients.append(model.model.layers[0].self_attn.k_proj.weight.grad)
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_as_close_as_eager(dtype: torch.dtype, kernels: Any, pair: Any) -> None:
    """Both are compared with float32 logits of the same rounded weights, in prefill and decoding past the window."""
    ours, eager = (model.to(dtype) for model in pair())
    truth = copy.deepcopy(eager).float()
    ids, mask = torch.randint(1, 99, (3, 30)), padding("left", 30)
    expected = truth(ids, attention_mask=mask).logits
    distances = []
    for model in (ours, eager):
        cache = RollingCache(model.config)
        with torch.no_grad():
            pieces = [
                model(ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache).logits
                for start, end in ((0, 20), *((step, step + 1) for step in range(20, 30)))
            ]
        difference = (torch.cat(pieces, dim=1).float() - expected) * mask[..., None]
        distances.append(difference.norm() / (expected * mask[..., None]).norm())
    assert distances[0] <= 1.3 * distances[1]


def test_autocast_decides_the_dtype(kernels: Any, pair: Any) -> None:
    ours, eager = (model.bfloat16() for model in pair())
    ids = torch.randint(1, 99, (2, 12))
    with torch.autocast("cpu", torch.float16):
        found, expected = ours(ids).logits, eager(ids).logits
    assert (found - expected).norm() < 0.03 * expected.norm()


class Spy:
    """A decoding function of the kernels that records the addresses of its keys."""

    def __init__(self, function: Any, monkeypatch: pytest.MonkeyPatch, kernels: Any) -> None:
        self.addresses: list[int] = []
        name = "with_cache" if isinstance(kernels, PackageKernels) else "varlen"

        def spy(query: Tensor, key: Tensor, *arguments: Any, **options: Any) -> Any:
            self.addresses.append(key.data_ptr())
            return function(query, key, *arguments, **options)

        monkeypatch.setattr(kernels, name, spy)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("filled", [6, 7, 30])
def test_a_step_reads_the_buffer_itself(
    static: bool, padded: bool, filled: int, kernels: Any, exact: None, pair: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernels get the buffers of all layers before, at and after the wrap, and do not read empty slots."""
    ours, _ = pair(sliding_window=8)
    cache = RollingCache(ours.config, max_cache_len=64 if static else None)
    ids = torch.randint(1, 99, (3, filled + 1))
    mask = padding("left", filled + 1)
    with torch.no_grad():
        ours(ids[:, :-1], attention_mask=mask[:, :-1] if padded else None, past_key_values=cache)
        for layer in cache.layers:
            layer.key_buffer[:, :, filled:], layer.value_buffer[:, :, filled:] = torch.nan, torch.nan
        function = kernels.with_cache if isinstance(kernels, PackageKernels) else kernels.varlen
        spy = Spy(function, monkeypatch, kernels)
        logits = ours(ids[:, -1:], attention_mask=mask if padded else None, past_key_values=cache).logits
    assert spy.addresses == [layer.key_buffer.data_ptr() for layer in cache.layers]
    assert logits.isfinite().all()


@pytest.mark.parametrize("implementation", ["eager", "sdpa", NAME])
@pytest.mark.parametrize("torch_like", [False, True])
@pytest.mark.parametrize("filled", [5, 40])
def test_no_step_waits_for_an_accelerator(
    implementation: str, torch_like: bool, filled: int, exact: None, make_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the meta device, where reading a value raises."""
    use(shapes_only(torch_like=torch_like), monkeypatch)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device_type: False)  # raises for the meta device
    model = make_model("ForCausalLM", implementation, head_dim=16).to("meta")
    cache = RollingCache(model.config)
    for layer in range(2):
        cache.update(*torch.empty(2, 3, 2, filled, 16, device="meta"), layer)
    token = torch.ones(3, 1, dtype=torch.long, device="meta")
    mask = torch.ones(3, filled + 1, dtype=torch.long, device="meta")
    with torch.no_grad():
        assert model(token, attention_mask=mask, past_key_values=cache).logits.shape == (3, 1, 99)
        with pytest.raises(Exception, match=r"meta"):
            bool(mask.any())


@pytest.mark.parametrize(
    ("query", "slots", "window", "padded", "expected"),
    [
        (4, 8, 8, 0, [5, None]),  # not full yet
        (9, 8, 8, 0, [8, None]),  # wrapped: all slots
        (4, 8, 8, 2, [2, 3, 4]),
        (7, 8, 8, 3, [3, 4, 5, 6, 7]),
        (9, 8, 8, 3, [0, 1, 3, 4, 5, 6, 7]),  # position 2, in slot 2, is still padding
        (10, 8, 8, 3, [0, 1, 2, 3, 4, 5, 6, 7]),
        (20, 8, 8, 19, [3, 4]),  # more padding than slots
        (9, 8, 3, 0, [0, 1, 7]),  # more slots than the window
        (3, 8, None, 2, [2, 3]),
    ],
)
def test_a_query_reads_exactly_the_slots_of_its_visible_keys(
    query: int, slots: int, window: int | None, padded: int, expected: list[Any], kernels: Any
) -> None:
    real = torch.arange(query + 1)[None] >= padded
    with torch.no_grad():
        layout = KeyLayout(torch.tensor(query), 0, slots, slots, cached=True)
        plan = make_mask(NAME, torch.empty(1, 1, 0), layout_of(layout, real if padded else None), window)
    if expected[-1] is None:
        assert plan.starts is None
        assert plan.lengths.tolist() == [expected[:1]]
        return
    pairs = zip(plan.starts[0].tolist(), plan.lengths[0].tolist(), strict=True)
    assert [slot for start, length in pairs for slot in range(start, start + length)] == expected


def test_several_queries_get_a_varlen_plan(kernels: Any) -> None:
    layout = KeyLayout(0, 0, 4)
    assert isinstance(make_mask(NAME, torch.empty(1, 4, 0), layout_of(layout), 3), VarlenPlan)


# Choosing this implementation, and what it refuses.


def load(folder: Any, **options: Any) -> Any:
    return MistralForCausalLM.from_pretrained(folder, attn_implementation=NAME, **options)


def test_flash_attention_can_be_chosen_at_loading_and_later(kernels: Any, flash_checkpoint: Any) -> None:
    """The name reaches the inner model, and the library's kernels do not replace ours."""
    model = load(flash_checkpoint, dtype="bfloat16")
    assert model.config._attn_implementation == model.model.config._attn_implementation == NAME
    with torch.no_grad():
        assert model(torch.ones(1, 3, dtype=torch.long)).logits.dtype == torch.bfloat16
    later = MistralForCausalLM.from_pretrained(flash_checkpoint, dtype="float16")
    later.set_attn_implementation(NAME)
    assert later.config._attn_implementation == NAME
    later.set_attn_implementation("eager")
    with pytest.raises(ValueError, match=r"float16 and bfloat16 only, not in torch\.float64"):
        later.double().set_attn_implementation(NAME)


@pytest.mark.parametrize("how", ["loading", "switching"])
def test_float32_weights_run_under_autocast_only(how: str, kernels: Any, flash_checkpoint: Any) -> None:
    """Master weights of mixed precision; computing in float32 is refused."""
    ids = torch.randint(1, 99, (2, 12))
    eager = MistralForCausalLM.from_pretrained(flash_checkpoint, dtype="float32", attn_implementation="eager")
    if how == "loading":
        model = load(flash_checkpoint, dtype="float32")
    else:
        model = copy.deepcopy(eager)
        model.set_attn_implementation(NAME)
    with pytest.raises(ValueError, match=r"not in torch\.float32: .* or run it under torch\.autocast"):
        model(ids)
    with torch.autocast("cpu", torch.bfloat16):
        loss, expected = (m(ids, labels=ids).loss for m in (model, eager))
    loss.backward()
    assert (loss - expected).abs() < 0.05
    assert model.model.embed_tokens.weight.grad.dtype == torch.float32


def test_other_dtypes_are_refused_at_loading(kernels: Any, flash_checkpoint: Any) -> None:
    with pytest.raises(ValueError, match=r"not in torch\.float64: load the model with dtype='bfloat16'"):
        load(flash_checkpoint, dtype="float64")


def test_float32_states_of_a_quantized_model_are_taken_in_its_dtype(kernels: Any, flash_checkpoint: Any) -> None:
    """As after PEFT's `prepare_model_for_kbit_training`, without autocast."""
    peft = pytest.importorskip("peft")
    pytest.importorskip("bitsandbytes")
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    ids, losses = torch.randint(1, 99, (2, 12)), []
    for implementation in (NAME, "sdpa"):
        options = {"dtype": "bfloat16", "quantization_config": nf4, "attn_implementation": implementation}
        model = MistralForCausalLM.from_pretrained(flash_checkpoint, **options)
        model = peft.prepare_model_for_kbit_training(model)
        model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "v_proj"]))
        losses.append(model(ids, labels=ids).loss)
        losses[-1].backward()
    assert (losses[0] - losses[1]).abs() < 0.05


def test_later_versions_go_through_the_library(kernels: Any, flash_checkpoint: Any) -> None:
    assert ALL_ATTENTION_FUNCTIONS["flash_attention_3"].__module__.startswith("transformers.")
    with pytest.raises(ImportError, match="FlashAttention3"):
        MistralForCausalLM.from_pretrained(flash_checkpoint, dtype="bfloat16", attn_implementation="flash_attention_3")


def test_dtype_and_device_are_checked_at_call(kernels: Any, make_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = make_model("ForCausalLM", NAME, head_dim=16), torch.ones(1, 3, dtype=torch.long)
    with pytest.raises(ValueError, match=r"not in torch\.float32"):
        model(ids)
    monkeypatch.setattr(kernels, "device_type", "cuda")
    with pytest.raises(ValueError, match=r"runs on cuda, and the model is on cpu: move it with model\.to\('cuda'\)"):
        model.bfloat16()(ids)


def test_right_padding_is_refused_with_a_cache(kernels: Any, pair: Any) -> None:
    model = pair()[0].bfloat16()
    ids, mask = torch.randint(1, 99, (3, 12)), padding("right", 12)
    with pytest.raises(ValueError, match=r'set tokenizer\.padding_side = "left"'):
        model.generate(ids, attention_mask=mask, max_new_tokens=2)
    cache = model(ids, attention_mask=mask, use_cache=True).past_key_values  # allowed, but not to be continued
    with pytest.raises(ValueError, match=r'set tokenizer\.padding_side = "left"'), torch.no_grad():
        model(ids[:, :1], attention_mask=torch.nn.functional.pad(mask, (0, 1), value=1), past_key_values=cache)


def test_padding_amid_a_window_is_refused(kernels: Any, exact: None, pair: Any) -> None:
    ids, mask = torch.randint(1, 99, (1, 12)), torch.ones(1, 12, dtype=torch.long)
    mask[0, 4:6] = 0
    with pytest.raises(ValueError, match="padding between real tokens"):
        pair()[0](ids, attention_mask=mask)
    ours, eager = pair(sliding_window=None)
    assert_same(ours(ids, attention_mask=mask).logits, eager(ids, attention_mask=mask).logits, mask)
    with pytest.raises(ValueError, match="no real tokens"):
        ours(ids, attention_mask=torch.zeros_like(mask))


def test_padding_between_turns_is_refused_with_the_remedy(kernels: Any, exact: None, pair: Any) -> None:
    """Rows of a batch end at different tokens, and the conversation goes on; sdpa takes this."""
    ours, eager = pair()
    ids, mask = torch.randint(1, 99, (2, 12)), torch.ones(2, 12, dtype=torch.long)
    mask[0, 6:8] = 0
    cache = RollingCache(ours.config)
    ours(ids[:, :6], past_key_values=cache)
    with pytest.raises(ValueError, match=r"padding between turns, choose attn_implementation='sdpa'"):
        ours(ids[:, 6:], attention_mask=mask, past_key_values=cache)
    ours.set_attn_implementation("sdpa")
    cache = RollingCache(ours.config)
    ours(ids[:, :6], past_key_values=cache)
    found = ours(ids[:, 6:], attention_mask=mask, past_key_values=cache).logits
    assert_same(found, eager(ids, attention_mask=mask).logits[:, 6:], mask[:, 6:])


def test_attention_weights_and_custom_masks_are_refused(kernels: Any, pair: Any) -> None:
    model, ids = pair()[0].bfloat16(), torch.ones(1, 3, dtype=torch.long)
    with pytest.raises(ValueError, match="cannot return attention weights: choose attn_implementation='eager'"):
        model(ids, output_attentions=True)
    with pytest.raises(ValueError, match=r"no custom mask \(Tensor\)"):
        model(ids, attention_mask=torch.ones(1, 1, 3, 3, dtype=torch.bool))


OLD_PACKAGE_GENERATION = {
    "unpadded": {},
    "static": {"cache_implementation": "static"},
    "padded": {"attention_mask": padding("left", 11)},
    "padded and static": {"attention_mask": padding("left", 11), "cache_implementation": "static"},
}


@pytest.mark.parametrize("window", [None, 8])
@pytest.mark.parametrize("how", OLD_PACKAGE_GENERATION)
def test_the_oldest_package_generates_as_eager_attention(
    how: str, window: int | None, exact: None, pair: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its decoding function cannot begin after the first key of a row."""
    use(OLD_PACKAGE, monkeypatch)
    ours, eager = pair(sliding_window=window)
    ids = torch.randint(1, 99, (3, 11))
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, **OLD_PACKAGE_GENERATION[how]}
    expected = eager.generate(ids, **{**options, "cache_implementation": None})
    assert torch.equal(ours.generate(ids, **options), expected)


@pytest.mark.parametrize("assisted", [False, True])
def test_the_oldest_package_takes_candidates_past_the_window(
    assisted: bool, exact: None, pair: Any, make_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(OLD_PACKAGE, monkeypatch)
    ours, eager = pair()
    ids = torch.randint(1, 99, (1, 11)).repeat(1, 2)
    options = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None}
    helper = {"assistant_model": make_model("ForCausalLM", "eager", head_dim=16, seed=3)} if assisted else {}
    found = ours.generate(ids, **options, **(helper or {"prompt_lookup_num_tokens": 3}))
    assert torch.equal(found, eager.generate(ids, **options))


def test_the_oldest_package_takes_a_mask_of_ones(exact: None, pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    use(OLD_PACKAGE, monkeypatch)
    monkeypatch.setattr(tracing, "FREE_DEVICES", frozenset())  # on an accelerator, a step does not read the mask
    ours, eager = pair()
    ids, logits = torch.randint(1, 99, (3, 15)), []
    for model in (ours, eager):
        cache = RollingCache(model.config)
        with torch.no_grad():
            model(ids[:, :14], past_key_values=cache)
            logits.append(model(ids[:, 14:], attention_mask=torch.ones(3, 15), past_key_values=cache).logits)
    assert_same(*logits)


# Compiled forward and training steps, and compiled decoding.


def training_inputs(kind: str) -> dict[str, Any]:
    """A left-padded batch, or packed sequences with their lengths."""
    if kind == "padded":
        ids, mask = torch.randint(1, 99, (3, 19)), padding("left", 19)
        return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    features = [{"input_ids": torch.randint(1, 99, (count,)).tolist()} for count in (9, 1, 13)]
    return DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_position_ids=kind == "packed")(features)


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("kind", ["padded", "packed", "packed without positions"])
def test_a_training_step_compiles_to_one_graph(
    kind: str, exact: None, pair: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(TorchKernels(standin.VARLEN_TRACEABLE, "cpu"), monkeypatch)
    model, _ = pair(num_hidden_layers=1)
    inputs, gradients = training_inputs(kind), []
    for run in (torch.compile(model, backend="aot_eager", fullgraph=True), model):
        model.zero_grad()
        run.train()(**inputs, use_cache=False).loss.backward()
        gradients.append([weight.grad.clone() for weight in model.parameters()])
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5)


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("source", ["package", "torch"])
@FAMILY
def test_a_static_step_compiles_to_one_graph(
    source: str, padded: bool, exact: None, pair: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has no breaks, and the same logits before, at and after the wrap, in two sequences of different lengths."""
    step_kernels: Any = KERNELS[source]
    if source == "torch":
        step_kernels = TorchKernels(standin.VARLEN_OPERATOR, "cpu")
    use(step_kernels, monkeypatch)
    ours, eager = pair()
    counter = CompileCounter()
    step = torch.compile(ours.forward, backend=counter, fullgraph=True)
    for prompt in (3, 6):
        ids = torch.randint(1, 99, (3, 20))
        mask = torch.ones(3, 20, dtype=torch.long)
        mask[0, :2] = int(not padded)
        expected = eager(ids, attention_mask=mask, use_cache=False).logits
        cache = RollingCache(ours.config, max_cache_len=64)
        with torch.no_grad():
            use(KERNELS[source], monkeypatch)  # the prompt's attention is not compiled
            ours(ids[:, :prompt], attention_mask=mask[:, :prompt], past_key_values=cache)
            use(step_kernels, monkeypatch)
            for index in range(prompt, 20):
                plan = ours.create_masks_for_generate(
                    ours.config, torch.empty(3, 1, 0), mask[:, : index + 1] if padded else None, cache
                )
                positions = mask[:, : index + 1].sum(dim=-1, keepdim=True) - 1
                logits = step(
                    ids[:, index : index + 1], attention_mask=plan, position_ids=positions, past_key_values=cache
                ).logits
                assert_same(logits, expected[:, index : index + 1])
    assert counter.frame_count == 1
