"""An all-reduce of what is not zero equals the dense one; so do engines with embeddings whose gradients are sparse."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from deepspeed.comm.choose import make_exchange
from deepspeed.comm.sparse import BLOCK, SparseReduction
from deepspeed.runtime.sparse_tensor import SparseTensor
from deepspeed.utils.errors import DeepSpeedConfigError, DeepSpeedError
from deepspeed.utils.waits import COMMUNICATION
from deepspeed.zero.untested import check_untested
from tests.engine.runs import engine_of, long_but, make_config, whole_weights
from tests.harness import run_ranks

CPU = torch.device("cpu")


def gradient(rank: int, rows: int, share: float, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(rank)
    touched = torch.rand(rows, 1, generator=generator) < share
    return (torch.randn(rows, BLOCK, generator=generator) * touched).to(dtype).view(-1)


def both_ways(rank: int, world_size: int, share: float, dtype: torch.dtype) -> tuple[bool, int]:
    inner = make_exchange(dist.group.WORLD, CPU)
    dense = gradient(rank, 400, share, dtype)
    sparse = dense.clone()
    inner.start_all_reduce(dense, divide_by=world_size).wait()
    before = COMMUNICATION.nbytes.get("zero.sparse_all_reduce", 0)
    SparseReduction(inner, min_blocks=8).start_all_reduce(sparse, divide_by=world_size).wait()
    return torch.equal(dense, sparse), COMMUNICATION.nbytes.get("zero.sparse_all_reduce", 0) - before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("share", [0.0, 0.05, 1.0])
@pytest.mark.parametrize("world_size", [2, 3])
def test_it_has_the_bits_of_the_dense_one_and_sends_fewer_bytes(
    world_size: int, share: float, dtype: torch.dtype
) -> None:
    for is_equal, nbytes in run_ranks(world_size, both_ways, share, dtype):
        assert is_equal
        assert nbytes < world_size * 400 * BLOCK * dtype.itemsize * 0.2


class Words(nn.Module):
    """A large table of which a batch touches few rows, and a bag of them."""

    def __init__(self, sparse: bool) -> None:
        super().__init__()
        self.table = nn.Embedding(3000, 64, sparse=sparse, padding_idx=7)
        self.bag = nn.EmbeddingBag(2000, 64, sparse=sparse)
        self.head = nn.Linear(64, 4)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(self.head(self.table(x).mean(1) + self.bag(x[:, 1:] % 2000)), y)


def trained(rank: int, world_size: int, stage: int, sparse: bool) -> tuple[list[float], dict[str, Tensor], int]:
    torch.manual_seed(0)
    model = Words(sparse)
    config = {**make_config(stage, micro=4, zero={"reduce_bucket_size": 10**6}), "sparse_gradients": sparse}
    losses, before = [], COMMUNICATION.nbytes.get("zero.sparse_all_reduce", 0)
    with engine_of(model, config) as engine:
        for step in range(4):
            generator = torch.Generator().manual_seed(10 * step + rank)
            x = torch.randint(0, 3000, (4, 5 + rank), generator=generator)
            x[:, 0] = 7  # padding: a row that all ranks name, with no gradient
            loss = engine(x, torch.randn(4, 4, generator=generator))
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
        weights = whole_weights(engine)
    return losses, weights, COMMUNICATION.nbytes.get("zero.sparse_all_reduce", 0) - before


@pytest.mark.parametrize(
    ("stage", "world_size"),
    long_but([(0, 2), (1, 2)], [(stage, world_size) for stage in range(4) for world_size in (2, 3)]),
)
def test_embeddings_with_sparse_gradients_train_as_dense_ones(stage: int, world_size: int) -> None:
    (losses, weights, sent), *_ = run_ranks(world_size, trained, stage, True)
    (expected, dense, _), *_ = run_ranks(world_size, trained, stage, False)
    assert losses == expected
    assert all(torch.equal(value, dense[name]) for name, value in weights.items())
    assert (sent > 0) == (stage == 0)


class Table(nn.Module):
    """An embedding alone, of which a batch may name rows that its loss leaves out."""

    def __init__(self, rows: int = 50) -> None:
        super().__init__()
        self.table = nn.Embedding(rows, 3, sparse=True)

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        return (self.table(x).pow(2).sum(-1) * counts).mean()


def batch_of(step: int, rank: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(10 * step + rank)
    return torch.randint(0, 50, (6,), generator=generator), torch.rand(6, generator=generator).round()


def rows_stepped(rank: int, world_size: int, folder: str) -> None:
    torch.manual_seed(0)
    model, alone = Table(), Table()
    alone.load_state_dict(model.state_dict())
    ours = torch.optim.SparseAdam(model.parameters(), lr=0.1)
    plain = torch.optim.SparseAdam(alone.parameters(), lr=0.1)
    config = make_config(0, micro=6, accumulation=2, zero={})
    config = {key: value for key, value in config.items() if key != "optimizer"} | {"gradient_clipping": 0.0}
    with engine_of(model, {**config, "sparse_gradients": True}, optimizer=ours) as engine:
        for step in range(8):
            engine.backward(engine(*batch_of(step, rank)))
            engine.step()
            for other in range(world_size):
                (alone(*batch_of(step, other)) / (2 * world_size)).backward()
            if step % 2:
                plain.step()
                plain.zero_grad()
        assert torch.allclose(model.table.weight, alone.table.weight, rtol=1e-6, atol=1e-7)
        assert engine.sparse_tensor_module_names == {"table.weight"}
        engine.save_checkpoint(folder, tag="a")
        saved = torch.load(Path(folder, "a", "mp_rank_00_model_states.pt"))
        assert saved["sparse_tensor_module_names"] == ["table.weight"]


def dense_beside(rank: int, world_size: int) -> None:
    model = Words(sparse=True)
    config = {key: value for key, value in make_config(0, micro=4).items() if key != "optimizer"}
    with engine_of(model, config, optimizer=torch.optim.SparseAdam(model.parameters())) as engine:
        engine.backward(engine(torch.zeros(4, 5, dtype=torch.long), torch.zeros(4, 4)))
        with pytest.raises(
            DeepSpeedError, match=r"SparseAdam takes sparse gradients alone, and those of head\.(bias|weight), head\."
        ):
            engine.step()


def test_sparse_adam_steps_the_rows_that_one_process_would(tmp_path: Path) -> None:
    run_ranks(2, rows_stepped, str(tmp_path))
    run_ranks(2, dense_beside)
    with pytest.raises(DeepSpeedConfigError, match="SparseAdam takes sparse gradients, of which ZeRO stage 1"):
        check_untested(torch.optim.SparseAdam(Table().parameters()), 1, True)


def test_rows_that_cancel_are_kept() -> None:
    dense = torch.zeros(4, 2)
    dense[1], dense[3] = torch.tensor([1.0, -1.0]), torch.tensor([2.0, 0.0])
    sparse = SparseTensor(dense)
    assert sparse.indices.tolist() == [1, 3]
    assert torch.equal(sparse.to_dense(), dense)
    assert torch.equal(sparse.to_coo_tensor().to_dense(), dense)
    sparse.add(SparseTensor(dense))
    assert torch.equal(sparse.to_dense(), 2 * dense)
    assert sparse.sparse_size() == (4 + 8, 8)
