"""What tools do with the reference's Mistral works with ours: adapters, loading, generation, old call forms."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BatchEncoding
from transformers.cache_utils import DynamicCache
from transformers.models.mistral.configuration_mistral import MistralConfig as StockConfig

from mistral_hf import MistralConfig, MistralForCausalLM, RollingCache
from mistral_hf.compatibility import CheckpointError

CLOSE = {"rtol": 1e-4, "atol": 1e-5}

peft = pytest.importorskip("peft")
CAUSAL = {"task_type": "CAUSAL_LM"}
TARGETS = ["q_proj", "v_proj", "down_proj"]
METHODS: dict[str, Callable[[], Any]] = {
    "LoRA": lambda: peft.LoraConfig(target_modules=TARGETS, init_lora_weights=False, **CAUSAL),
    "LoRA on all linear layers": lambda: peft.LoraConfig(
        target_modules="all-linear", init_lora_weights=False, **CAUSAL
    ),
    "LoRA on the embeddings": lambda: peft.LoraConfig(
        target_modules=["embed_tokens", "q_proj"], init_lora_weights=False, **CAUSAL
    ),
    "DoRA": lambda: peft.LoraConfig(target_modules=TARGETS, use_dora=True, init_lora_weights=False, **CAUSAL),
    "LoRA and trainable tokens": lambda: peft.LoraConfig(
        target_modules=TARGETS, init_lora_weights=False, trainable_token_indices=[1, 5, 98], **CAUSAL
    ),
    "LoRA and modules to save": lambda: peft.LoraConfig(
        target_modules=TARGETS, modules_to_save=["embed_tokens", "lm_head"], init_lora_weights=False, **CAUSAL
    ),
    "trainable tokens": lambda: peft.TrainableTokensConfig(
        token_indices=[1, 5, 98], target_modules=["embed_tokens"], init_weights=False
    ),
    "IA3": lambda: peft.IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"],
        feedforward_modules=["down_proj"],
        init_ia3_weights=False,
        **CAUSAL,
    ),
    "LoHa": lambda: peft.LoHaConfig(target_modules=TARGETS, init_weights=False, **CAUSAL),
    "LoKr": lambda: peft.LoKrConfig(target_modules=TARGETS, init_weights=False, **CAUSAL),
    "AdaLoRA": lambda: peft.AdaLoraConfig(target_modules=TARGETS, total_step=10, init_lora_weights=False, **CAUSAL),
    "OFT": lambda: peft.OFTConfig(
        target_modules=TARGETS, oft_block_size=4, use_cayley_neumann=False, init_weights=False, **CAUSAL
    ),
    "VeRA": lambda: peft.VeraConfig(target_modules=["q_proj"], r=4, init_weights=False, **CAUSAL),
    "layer norm": lambda: peft.LNTuningConfig(target_modules=["input_layernorm", "norm"], **CAUSAL),
    "prefix": lambda: peft.PrefixTuningConfig(num_virtual_tokens=3, **CAUSAL),
    "prefix with projection": lambda: peft.PrefixTuningConfig(
        num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=16, **CAUSAL
    ),
    "prompt": lambda: peft.PromptTuningConfig(num_virtual_tokens=3, **CAUSAL),
    "p-tuning": lambda: peft.PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=16, **CAUSAL),
    "adaption prompt": lambda: peft.AdaptionPromptConfig(adapter_len=3, adapter_layers=2, **CAUSAL),
}


def adapted(model: Any, method: str) -> Any:
    """The model with an adapter of random weights, the same for every model."""
    torch.manual_seed(3)
    wrapped = peft.get_peft_model(model, METHODS[method]()).eval()
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for _, weight in sorted(wrapped.named_parameters()):
            if weight.requires_grad and weight.is_floating_point():
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.1 + (weight.ndim == 1))
    return wrapped


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("method", METHODS)
def test_adapters_of_every_kind_compute_what_they_do_on_the_reference(
    method: str, make_pair: Any, token_ids: Any
) -> None:
    """Logits, loss, gradients, and greedy text past the window."""
    # The adaption prompt takes the heads' width for hidden_size / heads.
    options = {"head_dim": 8} if method == "adaption prompt" else {}
    window = None if "prefix" in method else 8
    pair, ids = make_pair(num_hidden_layers=3, sliding_window=window, **options), token_ids(2, 12)
    found = []
    for model in pair:
        wrapped = adapted(model, method)
        output = wrapped(input_ids=ids, labels=ids)
        output.loss.backward()
        gradients = {name: weight.grad for name, weight in wrapped.named_parameters() if weight.grad is not None}
        found.append((output.logits, output.loss, gradients, wrapped))
    (logits, loss, gradients, ours), (*expected, stock_gradients, stock) = found
    torch.testing.assert_close(logits, expected[0], **CLOSE)
    torch.testing.assert_close(loss, expected[1], **CLOSE)
    assert gradients.keys() == stock_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, stock_gradients[name], rtol=1e-3, atol=1e-4)
    text = ids[:, :9]
    for _ in range(8):  # not by generate, in which releases of the library and of PEFT pass the cache by two names
        text = torch.cat([text, stock(input_ids=text).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(ours.generate(input_ids=ids[:, :9], max_new_tokens=8, do_sample=False), text)


def test_embeddings_that_a_tool_wraps_are_used(make_model: Any, token_ids: Any) -> None:
    class Wrapped(nn.Module):
        def __init__(self, inner: nn.Embedding) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, ids: Tensor) -> Tensor:
            return 2 * self.inner(ids)

    model, ids = make_model(), token_ids(2, 5)
    expected = model(inputs_embeds=2 * model.get_input_embeddings()(ids)).logits
    model.set_input_embeddings(Wrapped(model.get_input_embeddings()))
    torch.testing.assert_close(model(ids).logits, expected)
    with pytest.raises(ValueError, match=r"input_ids\[0, 1\] = 99, but must lie in \[0, 99\)"):
        model(torch.tensor([[5, 99]]))


def test_attention_uses_the_rotary_factors_that_it_is_given(make_pair: Any) -> None:
    """In the library's layout, from a tool or changed by one."""
    pair, states = make_pair(implementation="eager"), torch.randn(2, 5, 32)
    positions = torch.arange(5)[None]
    found = []
    for model in pair:
        cos, sin = model.model.rotary_emb(states, positions)
        assert cos.shape == sin.shape == (1, 5, 12)
        attention = model.model.layers[0].self_attn
        for factors in ((cos, sin), (cos.clone(), sin.clone()), (cos * 0.5, sin), (cos, sin * -2)):
            found.append(attention(hidden_states=states, position_embeddings=factors, attention_mask=None)[0])
    for ours, stock in zip(found[:4], found[4:], strict=True):
        torch.testing.assert_close(ours, stock, **CLOSE)
    assert not torch.allclose(found[0], found[2])
    assert not torch.allclose(found[0], found[3])


@pytest.mark.parametrize("auto", [MistralForCausalLM, AutoModelForCausalLM])
@pytest.mark.parametrize("way", ["keyword", "config"])
def test_fewer_layers_than_the_checkpoint_has_are_loaded_on_request(
    auto: Any, way: str, checkpoint: Path, token_ids: Any
) -> None:
    whole = MistralForCausalLM.from_pretrained(checkpoint)
    options: dict[str, Any] = {"num_hidden_layers": 1}
    if way == "config":
        options = {"config": MistralConfig.from_pretrained(checkpoint, num_hidden_layers=1)}
    model = auto.from_pretrained(checkpoint, **options)
    assert len(model.model.layers) == 1
    whole.model.layers = whole.model.layers[:1]
    whole.config.num_hidden_layers = 1
    assert torch.equal(model(token_ids(1, 5)).logits, whole(token_ids(1, 5)).logits)


def test_a_file_with_fewer_layers_than_its_weights_is_refused_unless_the_lists_are_asked_for(checkpoint: Path) -> None:
    config = MistralConfig.from_pretrained(checkpoint, num_hidden_layers=1)
    config.save_pretrained(checkpoint)
    with pytest.raises(CheckpointError, match=r"has unknown 9 weights of a Mistral decoder.*layers\.1\."):
        AutoModelForCausalLM.from_pretrained(checkpoint)
    _, info = AutoModelForCausalLM.from_pretrained(checkpoint, output_loading_info=True)
    assert len(info["unexpected_keys"]) == 9


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}])
def test_right_padded_rows_without_a_cache_generate_as_the_reference(options: Any, make_pair: Any, padded: Any) -> None:
    texts = [
        model.generate(**padded(7, 4, 2, side="right"), max_new_tokens=5, do_sample=False, use_cache=False, **options)
        for model in make_pair()
    ]
    assert torch.equal(*texts)


def test_generate_takes_the_mapping_that_a_tokenizer_returns(make_model: Any, padded: Any) -> None:
    model, inputs = make_model(), padded(7, 4)
    options = {"max_new_tokens": 5, "do_sample": False}
    expected = model.generate(**inputs, **options)
    assert torch.equal(model.generate(BatchEncoding(dict(inputs)), **options), expected)
    assert torch.equal(model.generate(dict(inputs), **options), expected)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    assert torch.equal(model.generate(ids, attention_mask=mask, **options), expected)


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_a_cache_is_taken_by_its_present_and_its_former_name(name: str, make_model: Any, token_ids: Any) -> None:
    model, ids = make_model(), token_ids(2, 9)
    expected = model(ids, use_cache=False).logits[:, 5:]
    for part in (model, model.model):
        cache = RollingCache(model.config)
        part(ids[:, :5], **{name: cache})
        assert cache.get_seq_length() == 5
        hidden = part(ids[:, 5:], **{name: cache})[0]
        logits = hidden if part is model else model.lm_head(hidden)
        torch.testing.assert_close(logits, expected, **CLOSE)
        assert name in inspect.signature(part.forward).parameters
    cache = RollingCache(model.config)
    output = model.generate(ids, **{name: cache}, max_new_tokens=3, return_dict_in_generate=True, do_sample=False)
    assert output.past_key_values is cache
    assert torch.equal(output.sequences, model.generate(ids, max_new_tokens=3, do_sample=False))


def test_of_two_caches_the_one_with_more_tokens_is_continued(make_model: Any, token_ids: Any) -> None:
    model, ids = make_model(), token_ids(2, 9)
    expected = model(ids, use_cache=False).logits[:, 5:]
    for longer, shorter in (("cache", "past_key_values"), ("past_key_values", "cache")):
        cache = model(ids[:, :5], use_cache=True).past_key_values
        logits = model(ids[:, 5:], **{longer: cache, shorter: RollingCache(model.config)}).logits
        torch.testing.assert_close(logits, expected, **CLOSE)


def test_a_tuple_of_keys_and_values_is_refused_with_the_remedy(make_model: Any, token_ids: Any) -> None:
    model, ids = make_model(sliding_window=None), token_ids(1, 9)
    layers = model(ids[:, :8], use_cache=True).past_key_values.layers
    pairs = tuple((layer.keys, layer.values) for layer in layers)
    with pytest.raises(ValueError, match=r"cache is a tuple.*DynamicCache\(pairs\)"):
        model(ids[:, 8:], past_key_values=pairs)
    torch.testing.assert_close(
        model(ids[:, 8:], past_key_values=DynamicCache(pairs)).logits, model(ids).logits[:, -1:], **CLOSE
    )


def test_a_configuration_of_the_reference_is_refused_with_the_way_to_convert_it() -> None:
    fields = StockConfig().to_dict()
    with pytest.raises(
        ValueError, match=r"is a transformers\..*MistralConfig, but must be a mistral_hf\.MistralConfig"
    ):
        MistralForCausalLM(StockConfig())
    assert MistralConfig.from_dict(fields).head_shape == (32, 8, 128)
