"""Which saved-tensor hooks are on top, also where torch does not say."""

from __future__ import annotations

import threading

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from deepspeed.utils.saved_hooks import _Noted, top_saved_hooks


def test_what_is_noted_of_pushes_and_pops_is_what_torch_says(monkeypatch: pytest.MonkeyPatch) -> None:
    autograd = torch._C._autograd
    for name in ("_push_saved_tensors_default_hooks", "_pop_saved_tensors_default_hooks"):
        monkeypatch.setattr(autograd, name, getattr(autograd, name))  # put back afterwards
    noted = _Noted()

    def one(tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def two(tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    with saved_tensors_hooks(one, two):
        noted.watch(autograd)
        with saved_tensors_hooks(two, one):
            assert noted.top() == (two, one) == top_saved_hooks()
            with saved_tensors_hooks(one, one):
                assert noted.top() == (one, one) == top_saved_hooks()
                elsewhere = []
                thread = threading.Thread(target=lambda: elsewhere.append((noted.top(), top_saved_hooks())))
                thread.start()
                thread.join()
                assert elsewhere == [(None, None)]
            assert noted.top() == (two, one) == top_saved_hooks()
    assert noted.top() is None and top_saved_hooks() is None
