"""Layers that scripts cut by hand are the whole layer together; parameters are whole for a while; shard sizes by heads."""

from __future__ import annotations

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from deepspeed.module_inject.autotp_config import AutoTPConfig, AutoTPPresets, PartitionType, TPLayerSpec
from deepspeed.module_inject.layers import (
    Conv_LinearALlreduce,
    EmbeddingLayer,
    GateUpPack_LinearLayer,
    GatherReplacedLayerParams,
    HiddenParallelEmbedding,
    LinearAllreduce,
    LinearLayer,
    LmHeadLinearAllreduce,
    Normalize,
    OPTEmbedding,
    SubParamLinearAllreduce,
    SubParamLinearLayer,
    VocabParallelEmbedding,
    conv_LinearLayer,
    fused_LinearLayer,
    is_model_parallel_parameter,
)
from deepspeed.module_inject.tp_shard import get_shard_size, get_shard_size_list
from tests.harness import run_ranks

Conv1D = pytest.importorskip("transformers.pytorch_utils").Conv1D


def compare(rank: int, world_size: int) -> None:
    group = torch.distributed.group.WORLD
    torch.manual_seed(0)
    up, down, x = nn.Linear(6, 9), nn.Linear(9, 5), torch.randn(2, 3, 6, requires_grad=True)
    want = down(up(x).relu())
    want.square().sum().backward()
    expected, grad = x.grad, up.weight.grad
    x.grad = None
    column = LinearLayer(copy.deepcopy(up), group)
    row = LinearAllreduce(copy.deepcopy(down), group)
    got = row(column(x).relu())
    got.square().sum().backward()
    assert torch.allclose(got, want, atol=1e-5)
    assert torch.allclose(x.grad, expected, atol=1e-4)
    own = slice(0, 5) if rank == 0 else slice(5, 9)
    assert torch.allclose(column.weight.grad, grad[own], atol=1e-4)
    with GatherReplacedLayerParams(column.weight, column):
        assert torch.equal(column.weight.data, up.weight.data)
        column.weight.data.add_(1.0)
    assert torch.equal(column.weight.data, up.weight.data[own] + 1.0)
    joined = LinearLayer(copy.deepcopy(up), group, gather_output=True)
    assert torch.allclose(joined(x), up(x), atol=1e-6)
    assert torch.allclose(LmHeadLinearAllreduce(copy.deepcopy(up), group)(x), up(x), atol=1e-6)
    assert LinearLayer(copy.deepcopy(up))(x).shape == (2, 3, 9)


def rows_of(layer: nn.Module) -> list[int]:
    """The rows, or columns, that a layer of `numbered` weights has."""
    weight = layer.weight.data
    return [int(v) for v in (weight[:, 0] if weight[0, -1] == weight[0, 0] else weight[0])]


def numbered(out: int, inner: int, dim: int = 0) -> nn.Linear:
    """A layer whose weights are their row's, or column's, number."""
    layer = nn.Linear(inner, out)
    layer.weight.data = torch.arange(float(layer.weight.shape[dim])).unsqueeze(1 - dim).expand(out, inner).clone()
    return layer


def compare_others(rank: int, world_size: int) -> None:
    group = torch.distributed.group.WORLD
    assert rows_of(SubParamLinearLayer(numbered(8, 3), group, ((4, 2, 2), -1))) == [[0, 1, 4, 6], [2, 3, 5, 7]][rank]
    assert rows_of(SubParamLinearLayer(numbered(6, 3), group, (3, -1), 0)) == [[0, 2, 4], [1, 3, 5]][rank]
    assert (
        rows_of(SubParamLinearAllreduce(numbered(3, 8, 1), group, (3, (4, 4)), 1)) == [[0, 1, 4, 5], [2, 3, 6, 7]][rank]
    )
    assert rows_of(GateUpPack_LinearLayer(numbered(8, 3), group)) == [[0, 1, 4, 5], [2, 3, 6, 7]][rank]
    around = SimpleNamespace(config=SimpleNamespace(model_type="phi3", num_attention_heads=4, num_key_value_heads=2))
    assert rows_of(fused_LinearLayer(numbered(8, 3), group, fused_module=around)) == [[0, 1, 4, 6], [2, 3, 5, 7]][rank]
    with pytest.raises(ValueError, match="nothing tells how the 8 rows of the layer are ordered"):
        fused_LinearLayer(numbered(8, 3), group)
    torch.manual_seed(0)
    up, down, x = Conv1D(9, 6), Conv1D(5, 9), torch.randn(2, 3, 6, requires_grad=True)
    want = down(up(x).relu())
    (expected,) = torch.autograd.grad(want.square().sum(), x)
    column = conv_LinearLayer(copy.deepcopy(up), group)
    got = Conv_LinearALlreduce(copy.deepcopy(down), group)(column(x).relu())
    assert torch.allclose(got, want, atol=1e-6)
    assert torch.allclose(torch.autograd.grad(got.square().sum(), x)[0], expected, atol=1e-6)
    table, ids = nn.Embedding(7, 5, padding_idx=2), torch.tensor([[0, 6, 2], [3, 4, 5]])
    for kind in (VocabParallelEmbedding, HiddenParallelEmbedding):
        cut = kind(copy.deepcopy(table), group)
        assert torch.equal(cut(ids), table(ids)) and cut.weight.numel() < table.weight.numel()
    head = LinearLayer(copy.deepcopy(up_linear := nn.Linear(5, 7)), group)
    tied = VocabParallelEmbedding(table, group, tied_vocab_parallel_linear=head)
    assert tied.weight is head.weight and torch.equal(tied(ids), F.embedding(ids, up_linear.weight))
    param, before = head.weight, head.weight.data
    assert is_model_parallel_parameter(param)
    param.gather_params([param])
    assert torch.equal(param.data, up_linear.weight.data)
    param.data.mul_(2)
    param._tp_partition([param])
    assert param.data is not before and param.data.data_ptr() == before.data_ptr()  # who holds the memory sees it
    assert torch.equal(before, up_linear.weight.data.tensor_split(2)[0] * 2 if rank == 0 else before)
    assert (
        pickle.loads(pickle.dumps(param)).shape == param.shape and copy.deepcopy(head)(torch.ones(1, 5)).shape[-1] < 7
    )


def test_layers_that_are_cut_by_hand_are_the_whole_one_together() -> None:
    run_ranks(2, compare)
    run_ranks(2, compare_others)


def test_small_modules_of_the_same_place_compute_what_they_are_called() -> None:
    table, x = torch.randn(9, 4), torch.randn(2, 4)
    assert torch.equal(EmbeddingLayer(weight=table)(torch.tensor([3])), table[[3]])
    mask = torch.tensor([[0, 1, 1, 1]])
    assert torch.equal(OPTEmbedding(weight=table)(mask, 1)[0], table[[2, 3, 4]])
    assert torch.equal(Normalize(4)(x), F.layer_norm(x, (4,)))
    assert torch.equal(
        Normalize(weight=table[0], bias=table[1], eps=0.1)(x), F.layer_norm(x, (4,), table[0], table[1], 0.1)
    )


def test_rules_as_objects_say_which_layer_becomes_what() -> None:
    llama = AutoTPPresets.get_preset("llama")
    assert llama is not None and AutoTPPresets.get_preset("nothing") is None
    found = llama.find_matching_spec("model.layers.0.self_attn.o_proj.weight")
    assert found is not None and found.partition_type is PartitionType.ROW and found.get_partition_dim() == 1
    assert llama.find_matching_spec("lm_head.weight") is None
    gqa = AutoTPPresets.llama_gqa(8, 2, 16).find_matching_spec("model.layers.0.self_attn.qkv_proj.weight")
    assert gqa is not None and gqa.shape == ((128, 32, 32), -1)
    made = AutoTPConfig.from_dict(
        {"layer_specs": [{"patterns": [".*a"], "partition_type": "skip", "model_types": ["x"]}]}
    )
    assert made.layer_specs[0].partition_type is PartitionType.SKIP and made.find_matching_spec("b.a", "y") is None
    for shape, dim, words in (
        ((-1, (1, 2)), 0, "nested tuple only allowed at partition_dim="),
        ((((1,),), -1), 0, "supports only 1-level nesting"),
        ((0, -1), 0, "dimensions must be positive integers or -1"),
        ((2, -1), 3, "partition_dim 3 is out of range"),
    ):
        with pytest.raises(ValueError, match=words):
            TPLayerSpec([".*"], shape=shape, partition_dim=dim)
    with pytest.raises(NotImplementedError, match="gather_output"):
        TPLayerSpec([".*"], shape=(2, -1), gather_output=True)


def test_shard_sizes_keep_key_heads_whole() -> None:
    assert get_shard_size_list(1024, 3, 8, "self_attn.k_proj") == [384, 384, 256]
    assert get_shard_size_list(1024, 3, 2) == [512, 512, 0]
    assert get_shard_size_list(10, 3, "mlp.up_proj") == [4, 3, 3]
    assert get_shard_size(10, 3, None, "lm_head", rank=0) == 4
