"""Mixtures of experts of the transformers library, as grouped products and as products of chosen weights."""

from copy import deepcopy

import pytest
import torch
from torch import nn

from fedpress.compress import check_parity, parameters, remove_, trace
from fedpress.compress.prune.plan import make_plan

transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 2,
}


class Logits(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, words):
        return self.inner(input_ids=words, use_cache=False).logits


def qwen(how):
    config = transformers.Qwen3MoeConfig(**SIZES, moe_intermediate_size=24, num_experts=4)
    return transformers.Qwen3MoeForCausalLM._from_config(config, experts_implementation=how)


def gpt_oss(how):
    config = transformers.GptOssConfig(**SIZES, num_local_experts=4, layer_types=["full_attention"])
    return transformers.GptOssForCausalLM._from_config(config, experts_implementation=how)


@pytest.mark.parametrize(
    ("build", "how"),
    [
        (qwen, "grouped_mm"),
        (gpt_oss, "batched_mm"),
        pytest.param(qwen, "batched_mm", marks=pytest.mark.recipe),
        pytest.param(gpt_oss, "grouped_mm", marks=pytest.mark.recipe),
    ],
)
def test_all_experts_lose_the_same_units_exactly(build, how):
    torch.manual_seed(0)
    model, words = Logits(build(how)).eval(), torch.randint(64, (2, 7))
    graph = trace(model, words)
    assert any(layer.name.endswith("experts") for layer in graph.groups), graph.unprunable
    draw = torch.Generator().manual_seed(0)
    kept = [max(1, layer.channels // 2) for layer in graph.groups]
    cut = make_plan(
        model, graph, [torch.rand(layer.channels, generator=draw) for layer in graph.groups], kept
    )
    small = deepcopy(model)
    remove_(small, cut)
    assert check_parity(model, small, cut, words) <= 1e-5
    assert parameters(small) == cut.parameters_after == graph.parameters(kept)
