"""Language models of the transformers library, as they are, with both of its implementations of attention."""

from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

from fedpress.compress import check_parity, plan, remove_, score, trace
from fedpress.compress.prune.plan import make_plan

transformers = pytest.importorskip("transformers")
SIZES = {"vocab_size": 60, "use_cache": False}
WAYS = ("sdpa", "eager")


class Logits(nn.Module):
    """A model that takes words, or words of two languages, and gives logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, words: Tensor, answer: Tensor | None = None) -> Tensor:
        more = {} if answer is None else {"decoder_input_ids": answer}
        return self.model(input_ids=words, **more).logits


def gpt2(how: str) -> nn.Module:
    config = transformers.GPT2Config(
        n_embd=32, n_layer=2, n_head=4, n_positions=16, attn_implementation=how, **SIZES
    )
    return transformers.GPT2LMHeadModel(config)


def llama(how: str) -> nn.Module:
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        attn_implementation=how,
        **SIZES,
    )
    return transformers.LlamaForCausalLM(config)


def t5(how: str) -> nn.Module:
    config = transformers.T5Config(
        d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, attn_implementation=how, **SIZES
    )
    return transformers.T5ForConditionalGeneration(config)


MODELS = {"gpt2": gpt2, "llama": llama, "t5": t5}


def made(name: str, how: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Returns the model with biases and scales that are not 0 and 1, and words for it."""
    torch.manual_seed(0)
    model = Logits(MODELS[name](how)).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data.uniform_(-0.5, 1)
    words = (torch.randint(60, (2, 7)),)
    return model, words if name != "t5" else (*words, torch.randint(60, (2, 5)))


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("gpt2", "sdpa"),
        ("llama", "eager"),
        pytest.param("gpt2", "eager", marks=pytest.mark.recipe),
        pytest.param("llama", "sdpa", marks=pytest.mark.recipe),
        pytest.param("t5", "sdpa", marks=pytest.mark.recipe),
        pytest.param("t5", "eager", marks=pytest.mark.recipe),
    ],
)
def test_a_language_model_is_cut_exactly_in_heads_and_hidden_units(name, how):
    model, words = made(name, how)
    graph = trace(model, words)
    cut = plan(model, graph, score(model, graph, "l1"), keep_params=0.6, round_to=1, tolerance=0.05)
    assert cut.parameters_after < 0.66 * cut.parameters_before
    small = deepcopy(model)
    remove_(small, cut)
    assert check_parity(model, small, cut, words) <= 1e-5
    assert (small(*words) - model(*words)).abs().max() > 1e-3  # something is gone
    longer = tuple(torch.cat([x, x.flip(1)[:, :2]], 1).repeat(3, 1) for x in words)
    assert check_parity(model, small, cut, longer) <= 1e-5
    heads = [layer for layer in graph.groups if "attn" in layer.name or "Attention" in layer.name]
    assert 2 <= len(heads) < len(graph.groups)
    reasons = ("layer_norm", "statistic over channels", "looked up", "output of the model")
    assert all(any(reason in why for reason in reasons) for why in graph.unprunable.values())


@pytest.mark.recipe
def test_a_model_that_gives_its_cache_keeps_the_heads_that_are_in_it():
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=16, vocab_size=60)
    model, words = transformers.GPT2LMHeadModel(config).eval(), torch.randint(60, (2, 7))
    graph = trace(model, words)
    assert [layer.name for layer in graph.groups] == [
        "transformer.h.0.mlp.c_fc",
        "transformer.h.1.mlp.c_fc",
    ]
    cut = plan(model, graph, score(model, graph, "l1"), keep_params=0.7, round_to=1, tolerance=0.05)
    small = deepcopy(model)
    remove_(small, cut)
    assert check_parity(model, small, cut, words) <= 1e-5


@pytest.mark.recipe
@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("name", MODELS)
def test_any_choice_of_channels_of_a_language_model_is_exact_also_under_export(name, how):
    model, words = made(name, how)
    graph = trace(model, words)
    for seed in range(4):
        draw = torch.Generator().manual_seed(seed)
        kept = [
            int(torch.randint(1, layer.channels + 1, (), generator=draw)) for layer in graph.groups
        ]
        chosen = make_plan(
            model, graph, [torch.rand(n.channels, generator=draw) for n in graph.groups], kept
        )
        small = deepcopy(model)
        remove_(small, chosen)
        assert check_parity(model, small, chosen, words) <= 1e-5
        exported = torch.export.export(small, words, strict=False).module()
        torch.testing.assert_close(exported(*words), small(*words), atol=1e-5, rtol=1e-5)
