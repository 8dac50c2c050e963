"""The five models against the reference and the oracle, and the contract of a Transformers model."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from tests.conftest import HEADS, VOCABULARY
from tests.helpers import reference

TIGHT = {"rtol": 1e-5, "atol": 1e-5}
IMPLEMENTATIONS = ("eager", "sdpa")


def outputs_of(output: Any) -> dict[str, Tensor]:
    """The tensors that a head computes, by name."""
    return {name: value for name, value in output.items() if isinstance(value, Tensor)}


def assert_same_outputs(ours: Any, stock: Any, real: Tensor | None = None, **tolerance: float) -> None:
    """All output tensors are close where tokens are real; the logits of padding mean nothing."""
    ours, stock = outputs_of(ours), outputs_of(stock)
    assert ours.keys() == stock.keys()
    for name, expected in stock.items():
        per_token = real is not None and expected.shape[:2] == real.shape
        where = real.bool() if per_token else ...
        torch.testing.assert_close(ours[name][where], expected[where], **(tolerance or TIGHT))


def labels_of(head: str, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Labels for a head; a row's first real token is not a label, since padding would have to predict it."""
    ids = inputs["input_ids"]
    if head == "ForCausalLM":
        mask = inputs.get("attention_mask", torch.ones_like(ids))
        return {"labels": ids.masked_fill(mask.cumsum(dim=1) * mask <= 1, -100)}
    if head == "ForSequenceClassification":
        return {"labels": torch.arange(len(ids)) % 2}
    if head == "ForTokenClassification":
        return {"labels": (ids % 2).masked_fill(ids == 0, -100)}
    if head == "ForQuestionAnswering":
        return {"start_positions": torch.full((len(ids),), 3), "end_positions": torch.full((len(ids),), 5)}
    return {}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("head", HEADS)
def test_forward_and_loss_match_the_reference(
    head: str, side: str, implementation: str, make_pair: Any, padded: Callable[..., dict[str, Tensor]]
) -> None:
    pair = make_pair(head, implementation)
    inputs = padded(21, 4, 13, side=side)
    assert_same_outputs(*pair(**inputs, **labels_of(head, inputs)), real=inputs["attention_mask"])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("head", HEADS)
def test_gradients_match_the_reference(head: str, implementation: str, make_pair: Any, padded: Any) -> None:
    pair = make_pair(head, implementation)
    # An answer may lie in the padding, where the two implementations of the reference differ.
    inputs = padded(21, 21) if head == "ForQuestionAnswering" else padded(21, 4, 13)
    for output in pair(**inputs, **labels_of(head, inputs)):
        real = inputs["attention_mask"].bool()
        (output.loss if "loss" in output else output.last_hidden_state[real].pow(2).mean()).backward()
    expected = dict(pair.stock.named_parameters())
    for name, parameter in pair.ours.named_parameters():
        torch.testing.assert_close(
            parameter.grad, expected[name].grad, msg=lambda m, name=name: f"{name}: {m}", **TIGHT
        )


@pytest.mark.parametrize("window", [None, 1, 2, 8])
@pytest.mark.parametrize("length", [1, 7, 8, 9, 19])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_logits_match_the_oracle_for_every_window_and_length(
    window: int | None, length: int, implementation: str, make_pair: Any, padded: Any
) -> None:
    pair = make_pair("ForCausalLM", implementation, sliding_window=window)
    inputs = padded(length, max(1, length // 2), 1)
    ours, stock = pair(**inputs)
    real = inputs["attention_mask"].bool()
    oracle = reference.logits(pair.ours.state_dict(), pair.ours.config, **inputs)
    torch.testing.assert_close(ours.logits[real], oracle[real], **TIGHT)
    torch.testing.assert_close(ours.logits[real], stock.logits[real], **TIGHT)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("window", [None, 1, 100, 600])
def test_long_inputs_and_their_gradients_match_the_reference(
    window: int | None, implementation: str, make_pair: Any, padded: Any
) -> None:
    """Inputs longer than a block of queries, whose mask is a rule and not a tensor.

    The reference counts positions from the padding, which would make the angles less accurate.
    """
    pair = make_pair("ForCausalLM", implementation, sliding_window=window, num_hidden_layers=1)
    inputs = padded(700, 650)
    inputs["position_ids"] = (inputs["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)
    outputs = pair(**inputs, **labels_of("ForCausalLM", inputs))
    assert_same_outputs(*outputs, real=inputs["attention_mask"])
    with torch.no_grad():  # then bands are views, and the keys of a prompt go through the cache
        assert_same_outputs(*pair(**inputs), real=inputs["attention_mask"])
    for output in outputs:
        output.loss.backward()
    expected = dict(pair.stock.named_parameters())
    for name, parameter in pair.ours.named_parameters():
        torch.testing.assert_close(
            parameter.grad, expected[name].grad, msg=lambda m, name=name: f"{name}: {m}", **TIGHT
        )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", [(4, 4, 8), (4, 1, 6), (6, 3, 10)], ids=["mha", "mqa", "gqa"])
def test_every_head_shape_matches_the_oracle_in_double_precision(
    shape: tuple[int, int, int], implementation: str, make_model: Any, token_ids: Any
) -> None:
    heads, kv_heads, head_dim = shape
    model = make_model(
        "Model", implementation, num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head_dim
    ).double()
    ids = token_ids(2, 19)
    expected = reference.hidden_states(model.state_dict(), model.config, ids)[-1]
    # Rotary angles and the softmax weights of eager attention are float32 in every dtype, as in the reference.
    torch.testing.assert_close(model(ids).last_hidden_state, expected, **TIGHT)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_low_precision_is_as_accurate_as_the_reference(
    dtype: torch.dtype, implementation: str, make_model: Any, to_stock: Any, padded: Any
) -> None:
    """Against the float64 oracle with the same rounded weights; the largest error is given in steps of the dtype."""
    model = make_model("ForCausalLM", implementation).to(dtype)
    inputs = padded(40, 25, 31)
    real = inputs["attention_mask"].bool()
    weights = {name: weight.double() for name, weight in model.state_dict().items()}
    exact = reference.logits(weights, model.config, **inputs)[real]
    ours, stock = (m(**inputs).logits for m in (model, to_stock(model)))
    assert ours.dtype == dtype
    error, stock_error = ((logits[real].double() - exact).abs() for logits in (ours, stock))
    assert error.mean() <= 1.1 * stock_error.mean()
    assert error.max() <= 16 * torch.finfo(dtype).eps * exact.abs().max()


@pytest.mark.parametrize("kind", ["default", *ROPE_INIT_FUNCTIONS])
def test_rope_types_match_the_reference(kind: str, rope_parameters: Any, make_pair: Any, token_ids: Any) -> None:
    """Below, above and again below the pretrained length: some types change their frequencies in between."""
    pair = make_pair(
        rope_parameters=rope_parameters(kind),
        max_position_embeddings=64 if kind == "dynamic" else 256,
        sliding_window=50,
    )
    for length in (40, 100, 40):
        assert_same_outputs(*pair(input_ids=token_ids(2, length)))


@pytest.mark.parametrize("activation", ["gelu", "relu2", "gelu_pytorch_tanh"])
def test_activations_match_the_reference(activation: str, make_pair: Any, token_ids: Any) -> None:
    assert_same_outputs(*make_pair(hidden_act=activation)(input_ids=token_ids(2, 9)))


def test_initial_weights_are_distributed_as_in_the_reference(make_model: Any, to_stock: Any) -> None:
    from mistral_hf import MistralForSequenceClassification

    config = make_model(initializer_range=0.05, hidden_size=128, num_labels=4).config
    ours = MistralForSequenceClassification(config).state_dict()
    stock = type(to_stock(MistralForSequenceClassification(config)))(config).state_dict()
    for name, weight in stock.items():
        torch.testing.assert_close(ours[name].std(), weight.std(), rtol=0.25, atol=0, msg=name)
        torch.testing.assert_close(ours[name].mean(), weight.mean(), rtol=0, atol=0.02, msg=name)


@pytest.mark.parametrize("head", HEADS)
def test_parameters_match_the_reference(head: str, make_pair: Any) -> None:
    pair = make_pair(head)
    ours, stock = ({n: (p.shape, p.dtype) for n, p in m.named_parameters()} for m in pair)
    assert list(ours) == list(stock)
    assert ours == stock
    assert [n for n, _ in pair.ours.named_buffers()] == [n for n, _ in pair.stock.named_buffers()]
    for name in ("_no_split_modules", "_tied_weights_keys", "base_model_prefix", "tp_plan", "pp_plan"):
        assert getattr(pair.ours, name) == getattr(pair.stock, name), name


def test_inputs_embeds_give_the_logits_of_their_ids(make_pair: Any, padded: Any) -> None:
    pair = make_pair()
    inputs = padded(12, 5)
    embeds = pair.ours.get_input_embeddings()(inputs["input_ids"]).detach().requires_grad_()
    by_embeds = pair.ours(inputs_embeds=embeds, attention_mask=inputs["attention_mask"])
    torch.testing.assert_close(by_embeds.logits, pair.ours(**inputs).logits, rtol=0, atol=0)
    by_embeds.logits.sum().backward()
    assert embeds.grad.abs().sum() > 0


def test_logits_to_keep_selects_positions(make_pair: Any, token_ids: Any) -> None:
    pair, ids = make_pair(), token_ids(2, 9)
    full = pair.ours(ids).logits
    for kept in (1, 4, torch.tensor([0, 3, 8]), torch.tensor([-1, 2])):
        ours, stock = (m(ids, logits_to_keep=kept).logits for m in pair)
        expected = full[:, -kept:] if isinstance(kept, int) else full[:, kept]
        torch.testing.assert_close(ours, expected, **TIGHT)
        torch.testing.assert_close(ours, stock, **TIGHT)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_hidden_states_match_the_reference_and_the_oracle(implementation: str, make_pair: Any, padded: Any) -> None:
    pair = make_pair("Model", implementation)
    inputs = padded(12, 5)
    real = inputs["attention_mask"].bool()
    ours, stock = pair(**inputs, output_hidden_states=True)
    oracle = reference.hidden_states(pair.ours.state_dict(), pair.ours.config, **inputs)
    assert len(ours.hidden_states) == len(stock.hidden_states) == len(oracle) == 3
    for mine, theirs, exact in zip(ours.hidden_states, stock.hidden_states, oracle, strict=True):
        torch.testing.assert_close(mine[real], theirs[real], **TIGHT)
        torch.testing.assert_close(mine[real], exact[real], **TIGHT)


@pytest.mark.parametrize("length", [12, 600])
def test_attention_weights_match_the_reference(length: int, make_pair: Any, padded: Any) -> None:
    pair = make_pair("ForCausalLM", "eager", num_hidden_layers=1)
    inputs = padded(length, length - 3)
    real = inputs["attention_mask"].bool()
    ours, stock = pair(**inputs, output_attentions=True)
    (mine,), (theirs,) = ours.attentions, stock.attentions
    assert mine.shape == (2, 4, length, length)
    torch.testing.assert_close(mine.transpose(1, 2)[real], theirs.transpose(1, 2)[real], **TIGHT)
    beyond = ~reference.window_mask(length, 8) if length < 100 else torch.ones(length, length).tril(-8).bool()
    assert mine.transpose(1, 2)[0][:, :, beyond[0]].numel() == 0 or mine[0][:, beyond].max() == 0


def test_collected_states_follow_the_configuration(make_model: Any, token_ids: Any) -> None:
    model = make_model(implementation="eager")
    assert model(token_ids(1, 4)).hidden_states is None
    assert model(token_ids(1, 4)).attentions is None
    model.config.output_hidden_states = model.config.output_attentions = True
    output = model(token_ids(1, 4))
    assert len(output.hidden_states) == 3
    assert len(output.attentions) == 2


@pytest.mark.parametrize("head", HEADS)
def test_tuples_have_the_items_of_the_reference(head: str, make_pair: Any, padded: Any) -> None:
    pair, inputs = make_pair(head), padded(6, 4)
    ours, stock = pair(
        **inputs, **labels_of(head, inputs), return_dict=False, output_hidden_states=True, use_cache=False
    )
    assert isinstance(ours, tuple)
    assert [type(item) for item in ours] == [type(item) for item in stock]
    torch.testing.assert_close(ours[0], pair.ours(**inputs, **labels_of(head, inputs))[0], rtol=0, atol=0)


def test_use_cache_decides_whether_a_cache_is_returned(make_model: Any, token_ids: Any) -> None:
    from mistral_hf import RollingCache

    model = make_model()
    assert isinstance(model(token_ids(1, 4)).past_key_values, RollingCache)
    assert model(token_ids(1, 4), use_cache=False).past_key_values is None
    model.config.use_cache = False
    assert model(token_ids(1, 4)).past_key_values is None


def test_packed_sequences_do_not_see_each_other(make_model: Any, token_ids: Any) -> None:
    model, ids = make_model(), token_ids(1, 19)
    positions = torch.cat([torch.arange(7), torch.arange(12)])[None]
    packed = model(ids, position_ids=positions, use_cache=False).logits
    apart = torch.cat([model(ids[:, :7]).logits, model(ids[:, 7:]).logits], dim=1)
    torch.testing.assert_close(packed, apart, **TIGHT)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("additive", [False, True], ids=["boolean", "additive"])
@pytest.mark.parametrize("per_head", [False, True])
def test_custom_masks_match_the_reference(
    implementation: str, additive: bool, per_head: bool, make_pair: Any, token_ids: Any
) -> None:
    """A block-wise bidirectional mask, which our mask functions cannot make, shared by all heads or different."""
    pair, ids = make_pair("ForCausalLM", implementation), token_ids(2, 12)
    blocks = torch.arange(12) // 4
    mask = (blocks[:, None] >= blocks).expand(2, 4 if per_head else 1, 12, 12).clone()
    if per_head:
        mask[:, 1] = mask[:, 1].tril()
    usual = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    ours = pair.ours(ids, attention_mask=usual if additive else mask, use_cache=False).logits
    # The reference's eager attention only adds masks.
    stock = pair.stock(ids, attention_mask=usual, use_cache=False).logits
    torch.testing.assert_close(ours, stock, **TIGHT)
    assert (ours - pair.ours(ids).logits).abs().max() > 0.1


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_does_not_change_loss_and_gradients(
    use_reentrant: bool, make_model: Any, padded: Any
) -> None:
    plain = make_model().train()
    checkpointed = copy.deepcopy(plain)
    checkpointed.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    inputs = padded(12, 5)
    losses = []
    for model in (plain, checkpointed):
        output = model(**inputs, **labels_of("ForCausalLM", inputs), use_cache=False)
        output.loss.backward()
        losses.append(output.loss.item())
    assert losses[0] == losses[1]
    assert checkpointed.is_gradient_checkpointing
    expected = dict(plain.named_parameters())
    for name, parameter in checkpointed.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=0, atol=1e-6, msg=name)


def test_gradient_checkpointing_saves_memory(make_model: Any, token_ids: Any) -> None:
    """Fewer than half of the bytes are kept for the backward pass."""

    def saved_bytes(model: Any) -> int:
        total = 0

        def count(tensor: Tensor) -> Tensor:
            nonlocal total
            total += tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            model(token_ids(2, 64), labels=token_ids(2, 64), use_cache=False)
        return total

    model = make_model(num_hidden_layers=4).train()
    plain = saved_bytes(model)
    model.gradient_checkpointing_enable()
    assert saved_bytes(model) < plain / 2


def test_attention_dropout_acts_in_training_only(make_model: Any, token_ids: Any) -> None:
    for implementation in IMPLEMENTATIONS:
        model, ids = make_model(implementation=implementation, attention_dropout=0.5), token_ids(1, 9)
        assert torch.equal(model(ids).logits, model(ids).logits)
        model.train()
        assert not torch.equal(model(ids, use_cache=False).logits, model(ids, use_cache=False).logits)


@pytest.mark.parametrize("tied", [True, False])
def test_tied_weights_are_one_tensor_and_match_the_reference(
    tied: bool, make_model: Any, make_pair: Any, token_ids: Any
) -> None:
    pair = make_pair(tie_word_embeddings=tied)
    same = pair.ours.lm_head.weight is pair.ours.model.embed_tokens.weight
    assert same == tied
    assert_same_outputs(*pair(input_ids=token_ids(2, 9)))


@pytest.mark.parametrize("tied", [True, False])
def test_resized_embeddings_keep_the_logits_of_old_tokens(tied: bool, make_model: Any, token_ids: Any) -> None:
    model, ids = make_model(tie_word_embeddings=tied), token_ids(1, 9)
    before = model(ids).logits
    model.resize_token_embeddings(VOCABULARY + 5, mean_resizing=False)
    assert model.config.vocab_size == model.vocab_size == VOCABULARY + 5
    output = model(
        torch.cat([ids, torch.tensor([[VOCABULARY + 4]])], dim=1), labels=torch.full((1, 10), VOCABULARY + 4)
    )
    assert output.logits.shape[-1] == VOCABULARY + 5
    assert output.loss.isfinite()
    torch.testing.assert_close(output.logits[:, :-1, :VOCABULARY], before, **TIGHT)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    model.resize_token_embeddings(50)
    with pytest.raises(ValueError, match="input_ids"):
        model(torch.tensor([[60]]))


def test_fewer_layers_than_built_match_the_reference(make_pair: Any, token_ids: Any) -> None:
    pair = make_pair()
    for model in pair:
        model.config.num_hidden_layers = 1
    assert_same_outputs(*pair(input_ids=token_ids(1, 9)))


def test_a_model_without_layers_matches_the_reference(make_pair: Any, token_ids: Any) -> None:
    assert_same_outputs(*make_pair(num_hidden_layers=0)(input_ids=token_ids(2, 5), use_cache=False))


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_a_compiled_language_model_matches_the_model(backend: str, make_model: Any, padded: Any) -> None:
    model = make_model(num_hidden_layers=1)
    inputs = padded(12, 5)
    inputs |= labels_of("ForCausalLM", inputs)
    expected = model(**inputs, use_cache=False)
    compiled = torch.compile(model, fullgraph=True, backend=backend)(**inputs, use_cache=False)
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(compiled.logits[real], expected.logits[real], **TIGHT)
    torch.testing.assert_close(compiled.loss, expected.loss, **TIGHT)
    torch._dynamo.reset()


@pytest.mark.parametrize("head", ["ForSequenceClassification", "ForQuestionAnswering"])
def test_compiled_heads_match_the_model(head: str, make_model: Any, padded: Any) -> None:
    inputs = padded(12, 5)
    inputs |= labels_of(head, inputs)
    model = make_model(head, num_hidden_layers=1)
    compiled = torch.compile(model.forward, fullgraph=True, backend="eager")(**inputs, use_cache=False)
    assert_same_outputs(compiled, model(**inputs, use_cache=False), real=inputs["attention_mask"])
    torch._dynamo.reset()


@pytest.mark.parametrize("length", [12, 600])
def test_an_exported_program_matches_the_model(length: int, make_model: Any, token_ids: Any) -> None:
    model, ids = make_model(num_hidden_layers=1), token_ids(2, length)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    exported = torch.export.export(model, (), inputs, strict=False).module()
    torch.testing.assert_close(exported(**inputs).logits[:, 3:], model(**inputs).logits[:, 3:], **TIGHT)


@pytest.mark.parametrize("with_mask", [False, True])
def test_one_exported_program_serves_every_length(with_mask: bool, make_model: Any, token_ids: Any) -> None:
    """The lengths lie below and above the window, and beyond a block of queries."""
    model = make_model(num_hidden_layers=1)
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length", min=2, max=2000)}

    def inputs(batch: int, length: int) -> dict[str, Any]:
        ids = token_ids(batch, length)
        return {"input_ids": ids, "use_cache": False} | ({"attention_mask": torch.ones_like(ids)} if with_mask else {})

    shapes = {name: None if name == "use_cache" else sizes for name in inputs(2, 12)}
    exported = torch.export.export(model, (), inputs(2, 12), dynamic_shapes=shapes, strict=False).module()
    for batch, length in ((3, 30), (2, 5), (1, 600)):
        torch.testing.assert_close(
            exported(**inputs(batch, length)).logits, model(**inputs(batch, length)).logits, **TIGHT
        )


@pytest.fixture
def spy() -> Iterator[list[Any]]:
    """The masks given to a custom attention function that is registered as ``"spy"``."""
    masks: list[Any] = []

    def attention(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, scaling: float, **kwargs: Any
    ) -> tuple[Tensor, None]:
        masks.append(attention_mask)
        output = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attention_mask, scale=scaling, enable_gqa=True, is_causal=attention_mask is None
        )
        return output.transpose(1, 2), None

    AttentionInterface.register("spy", attention)
    yield masks
    AttentionInterface._global_mapping.pop("spy")
    AttentionMaskInterface._global_mapping.pop("spy", None)


@pytest.mark.parametrize("with_mask", [True, False])
def test_a_custom_attention_gets_the_mask_that_is_registered_for_it(
    with_mask: bool, spy: list[Any], make_model: Any, padded: Any
) -> None:
    if with_mask:
        AttentionMaskInterface.register("spy", sdpa_mask)
    model = make_model(sliding_window=8 if with_mask else None)
    inputs = padded(19, 13) if with_mask else {"input_ids": padded(19)["input_ids"]}
    expected = model(**inputs).logits
    model.set_attn_implementation("spy")
    real = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
    torch.testing.assert_close(model(**inputs).logits[real], expected[real], **TIGHT)
    assert len(spy) == 2
    assert all((mask is not None) == with_mask for mask in spy)


def test_a_custom_attention_generates_the_same_text_from_a_cache(spy: list[Any], make_model: Any, padded: Any) -> None:
    AttentionMaskInterface.register("spy", sdpa_mask)
    model = make_model()
    inputs = padded(11, 5)
    expected = model.generate(**inputs, max_new_tokens=20, do_sample=False)
    model.set_attn_implementation("spy")
    assert torch.equal(model.generate(**inputs, max_new_tokens=20, do_sample=False), expected)
    assert len(spy) == 2 * 20


def test_the_attention_implementation_can_be_switched(make_pair: Any, padded: Any) -> None:
    pair, inputs = make_pair("ForCausalLM", "eager"), padded(12, 5)
    for implementation in ("sdpa", "eager", "sdpa"):
        for model in pair:
            model.set_attn_implementation(implementation)
            assert model.config._attn_implementation == implementation
            assert model.model.config._attn_implementation == implementation
        assert_same_outputs(*pair(**inputs), real=inputs["attention_mask"])


def test_an_unknown_implementation_is_refused(make_model: Any) -> None:
    with pytest.raises(ValueError, match="psychic"):
        make_model(implementation="psychic")
    with pytest.raises(ValueError, match="psychic"):
        make_model().set_attn_implementation("psychic")


def test_flex_attention_matches_sdpa(make_model: Any, padded: Any) -> None:
    model = make_model(head_dim=16, num_hidden_layers=1)
    inputs = padded(40, 25)
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        expected = model(**inputs).logits
        model.set_attn_implementation("flex_attention")
        torch.testing.assert_close(model(**inputs, use_cache=False).logits[real], expected[real], **TIGHT)
        torch.testing.assert_close(model(**inputs).logits[real], expected[real], **TIGHT)


def test_a_copy_in_another_dtype_and_back_has_the_same_logits(make_model: Any, token_ids: Any) -> None:
    model, ids = make_model(), token_ids(1, 9)
    twin = copy.deepcopy(model).to(torch.float64).to(torch.float32)
    torch.testing.assert_close(twin(ids).logits, model(ids).logits, **TIGHT)
