"""`tile_model`: a model of Transformers in tiles has the loss and the gradients that it had."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from deepspeed.sequence import tile_model
from deepspeed.utils.errors import DeepSpeedError
from tests.parallel.sequence import runs


@pytest.mark.parametrize("items", [None, 7])
def test_loss_and_gradients_stay_what_they_were(items: int | None) -> None:
    found = []
    batch = runs.batch_of("plain", 17, 2)
    for is_tiled in (True, False):
        model = runs.tiny_model()
        if is_tiled:
            tile_model(model, mlp_tokens=5, loss_tokens=4)
        loss = model(**batch, **({} if items is None else {"num_items_in_batch": items})).loss
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters())])
    for tiled, whole in zip(*found, strict=True):
        torch.testing.assert_close(tiled, whole, rtol=1e-5, atol=1e-7)


def test_without_labels_it_answers_logits_and_other_models_are_refused() -> None:
    model = tile_model(runs.tiny_model(), mlp_tokens=5, loss_tokens=4)
    assert model(input_ids=torch.zeros(1, 6, dtype=torch.long)).logits.shape == (1, 6, runs.VOCAB)
    with pytest.raises(DeepSpeedError, match="Linear has no MLP"):
        tile_model(nn.Linear(2, 2))
    with pytest.raises(DeepSpeedError, match="no language head"):
        tile_model(nn.Linear(2, 2), mlp_tokens=None)
