from __future__ import annotations

import pytest
import torch
from torch import nn

from deepspeed.optim import FusedAdam, FusedLamb, FusedLion, MuonWithAuxAdam, Needs, RunPiece, needs_of
from deepspeed.optim.traits import WholeParameters
from deepspeed.utils.errors import NotAvailableError
from tests.optim.steps import parameters


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Adagrad, torch.optim.RMSprop])
def test_elementwise_classes_of_torch_are_known(kind: type[torch.optim.Optimizer]) -> None:
    assert needs_of(kind(parameters())) is Needs.ELEMENTWISE


@pytest.mark.parametrize("kind", [torch.optim.LBFGS, torch.optim.Adafactor, torch.optim.SparseAdam])
def test_optimizers_nobody_vouched_for_are_unknown(kind: type[torch.optim.Optimizer]) -> None:
    assert needs_of(kind(parameters())) is None


def test_a_subclass_of_a_known_class_is_unknown_until_it_declares() -> None:
    class Mine(torch.optim.SGD):
        pass

    class Declared(torch.optim.SGD):
        needs = Needs.PARAMETER_NORMS

    assert needs_of(Mine(parameters())) is None
    assert needs_of(Declared(parameters())) is Needs.PARAMETER_NORMS


def test_our_optimizers_declare_what_they_need() -> None:
    assert needs_of(FusedLion(parameters())) is Needs.ELEMENTWISE
    assert needs_of(FusedLamb(parameters())) is Needs.PARAMETER_NORMS
    assert needs_of(MuonWithAuxAdam([{"params": parameters(), "use_muon": False}])) is Needs.WHOLE_MATRICES


def test_a_piece_finds_its_elements_in_the_run_and_in_the_parameter() -> None:
    piece = RunPiece(index=0, shape=torch.Size([2, 3]), run_start=1, run_stop=3, param_start=4)
    assert piece.of_run(torch.arange(5)).tolist() == [1, 2]
    assert piece.of_param(torch.arange(6).view(2, 3)).tolist() == [4, 5]


def test_a_whole_parameter_is_one_piece_in_its_shape() -> None:
    first, second = parameters([(2, 3), (4,)])
    (piece,) = WholeParameters([first, second]).pieces(second)
    assert piece == RunPiece(1, second.shape, 0, 4, 0)
    assert piece.of_run(second) is second


@pytest.mark.parametrize("switch", ["amsgrad", "maximize"])
def test_a_switch_we_do_not_have_is_refused_also_in_a_group_of_another_optimizer(switch: str) -> None:
    other = torch.optim.AdamW(parameters(), **{switch: True})
    with pytest.raises(NotAvailableError, match=f"FusedAdam does not support {switch}=True"):
        FusedAdam(other.param_groups)


def test_a_sparse_gradient_is_refused() -> None:
    embedding = nn.Embedding(4, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(NotAvailableError, match=r"shape \(4, 2\) is sparse"):
        FusedAdam(embedding.parameters()).step()
