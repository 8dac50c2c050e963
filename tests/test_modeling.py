"""The five models against the reference and the oracle, and the contract of a Transformers model."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from tests.conftest import HEADS, VOCABULARY
from tests.helpers import reference
from tests.helpers.comparison import TIGHT, assert_same_outputs, labels_of
from tests.helpers.family import FAMILY, WINDOWED

IMPLEMENTATIONS = ("eager", "sdpa")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("head", HEADS)
@FAMILY
def test_forward_and_loss_match_the_reference(
    head: str, side: str, implementation: str, make_pair: Any, padded: Callable[..., dict[str, Tensor]]
) -> None:
    pair = make_pair(head, implementation)
    if head == "ForQuestionAnswering":  # an answer may lie in the padding, where the reference's back ends differ
        pair.stock.set_attn_implementation("sdpa")
    inputs = padded(21, 4, 13, side=side)
    assert_same_outputs(*pair(**inputs, **labels_of(head, inputs)), real=inputs["attention_mask"])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("head", HEADS)
@FAMILY
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
@WINDOWED
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
@FAMILY
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
@WINDOWED
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


@FAMILY
def test_initial_weights_are_distributed_as_in_the_reference(make_model: Any, to_stock: Any) -> None:
    model = make_model("ForSequenceClassification", initializer_range=0.05, hidden_size=128, num_labels=4)
    ours = type(model)(model.config).state_dict()
    stock = type(to_stock(model))(model.config).state_dict()
    for name, weight in stock.items():
        torch.testing.assert_close(ours[name].std(), weight.std(), rtol=0.25, atol=0, msg=name)
        torch.testing.assert_close(ours[name].mean(), weight.mean(), rtol=0, atol=0.02, msg=name)


@pytest.mark.parametrize("head", HEADS)
@FAMILY
def test_parameters_match_the_reference(head: str, make_pair: Any) -> None:
    pair = make_pair(head)
    ours, stock = ({n: (p.shape, p.dtype) for n, p in m.named_parameters()} for m in pair)
    assert list(ours) == list(stock)
    assert ours == stock
    assert [n for n, _ in pair.ours.named_buffers()] == [n for n, _ in pair.stock.named_buffers()]
    for name in ("_no_split_modules", "_tied_weights_keys", "base_model_prefix", "tp_plan", "pp_plan"):
        assert getattr(pair.ours, name) == getattr(pair.stock, name), name


@FAMILY
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
@WINDOWED
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
@FAMILY
def test_attention_weights_match_the_reference(length: int, make_pair: Any, padded: Any) -> None:
    pair = make_pair("ForCausalLM", "eager", num_hidden_layers=1)
    inputs = padded(length, length - 3)
    real = inputs["attention_mask"].bool()
    ours, stock = pair(**inputs, output_attentions=True)
    (mine,), (theirs,) = ours.attentions, stock.attentions
    assert mine.shape == (2, 4, length, length)
    torch.testing.assert_close(mine.transpose(1, 2)[real], theirs.transpose(1, 2)[real], **TIGHT)
    beyond = torch.ones(length, length).tril(-(pair.ours.config.layer_windows[0] or length)).bool()
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
@FAMILY
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


@pytest.mark.parametrize("use_reentrant", [True, False])
@FAMILY
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


def test_a_copy_in_another_dtype_and_back_has_the_same_logits(make_model: Any, token_ids: Any) -> None:
    model, ids = make_model(), token_ids(1, 9)
    twin = copy.deepcopy(model).to(torch.float64).to(torch.float32)
    torch.testing.assert_close(twin(ids).logits, model(ids).logits, **TIGHT)
