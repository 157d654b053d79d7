"""Gates against the formulas, token by token."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from deepspeed.moe.sharded_moe import TopKGate, top1gating, top2gating, topkgating
from deepspeed.parallel.expert.capacity import capacity_of, rows_on_the_wire
from deepspeed.parallel.expert.gate import Noise
from tests.harness import run_ranks

S, E = 13, 4


def logits(seed: int = 0) -> torch.Tensor:
    return torch.randn(S, E, generator=torch.Generator().manual_seed(seed)) * 2


@pytest.mark.parametrize(("k", "factor", "minimum"), [(1, 1.0, 0), (1, 0.5, 2), (3, 0.4, 0), (3, 2.0, 0)])
@pytest.mark.parametrize("policy", ["probs", "position"])
def test_each_expert_takes_its_capacity_and_no_more(k: int, factor: float, minimum: int, policy: str) -> None:
    values = logits()
    l_aux, combine, dispatch, counts = topkgating(values, k, factor, minimum, drop_policy=policy)
    gates, capacity = F.softmax(values, 1), max(math.ceil(S / E * k * factor), minimum)
    assert combine.shape == (S, E, capacity)
    chosen = [set(row.topk(k).indices.tolist()) for row in gates]
    assert counts.tolist() == [sum(e in c for c in chosen) for e in range(E)]
    for e in range(E):
        wanting = [t for t in range(S) if e in chosen[t]]
        order = sorted(wanting, key=lambda t: -gates[t, e]) if policy == "probs" else wanting
        kept = set(order[:capacity])
        assert {t for t in range(S) if dispatch[t, e].any()} == kept
        assert (dispatch[:, e].sum(0) <= 1).all()
        chosen = [c - ({e} if t in set(wanting) - kept else set()) for t, c in enumerate(chosen)]
    for t, mine in enumerate(chosen):
        weights = combine[t].sum(1)
        total = sum(gates[t, e] for e in mine)
        for e in range(E):
            torch.testing.assert_close(weights[e], gates[t, e] / total if e in mine else torch.zeros(()))
    me, ce = gates.mean(0), counts / S
    torch.testing.assert_close(l_aux, E * E * (me * ce).mean() / k)


def test_top1_weighs_by_the_probability_and_drops_late_comers_without_rts() -> None:
    values = logits(1)
    gates = F.softmax(values, 1)
    l_aux, combine, _, counts = top1gating(values, 0.7, 0, use_rts=False)
    capacity = capacity_of(S, E, 0.7)
    first = gates.argmax(1)
    taken = [0] * E
    for t in range(S):
        e = int(first[t])
        expected = torch.zeros(E, capacity)
        if taken[e] < capacity:
            expected[e, taken[e]] = gates[t, e]
        taken[e] += 1
        torch.testing.assert_close(combine[t], expected)
    assert counts.tolist() == taken
    torch.testing.assert_close(l_aux, E * (gates.mean(0) * counts / S).sum())


def test_random_token_selection_keeps_a_full_share_chosen_at_random() -> None:
    values = torch.zeros(S, E)
    values[:, 2] = 5.0
    kept = []
    for seed in range(30):
        torch.manual_seed(seed)
        _, _, dispatch, _ = top1gating(values, 1.0, 0)
        assert dispatch.sum() == capacity_of(S, E, 1.0)
        kept.append(frozenset(dispatch.any(2).any(1).nonzero().flatten().tolist()))
    assert len(set(kept)) > 10 and len(frozenset().union(*kept)) == S


def test_top2_puts_second_choices_behind_all_first_ones() -> None:
    values = logits(2)
    gates = F.softmax(values, 1)
    _, combine, dispatch, counts = top2gating(values, 0.5, 0, top2_2nd_expert_sampling=False)
    capacity = capacity_of(S, E, 1.0)
    best = gates.topk(2).indices
    queues: list[list[tuple[int, int]]] = [[] for _ in range(E)]
    for choice in range(2):
        for t in range(S):
            queues[int(best[t, choice])].append((t, choice))
    for e in range(E):
        assert {t for t in range(S) if dispatch[t, e].any()} == {t for t, _ in queues[e][:capacity]}
        assert counts[e] == len(queues[e])
    kept = dispatch.any(2)
    for t in range(S):
        total = (gates[t] * kept[t]).sum()
        torch.testing.assert_close(combine[t].sum(1), gates[t] * kept[t] / total.clamp_min(1e-9))


def test_nothing_is_dropped_on_request_and_the_capacity_is_the_largest_load() -> None:
    for found in (top1gating(logits(), 1.0, 0, drop_tokens=False), topkgating(logits(), 3, 1.0, 0, drop_tokens=False)):
        assert found[1].shape[2] == found[3].max() and found[2].sum() == found[3].sum()


def test_unused_tokens_go_nowhere() -> None:
    used = torch.ones(S)
    used[3:6] = 0
    _, _, dispatch, counts = top1gating(logits(), 4.0, 0, used)
    assert not dispatch[3:6].any() and counts.sum() == S - 3 == dispatch.sum()


def test_a_capacity_may_be_above_the_number_of_tokens_and_there_may_be_no_tokens() -> None:
    for gate in (
        lambda x: top1gating(x, 1.0, 20),
        lambda x: top2gating(x, 1.0, 20),
        lambda x: topkgating(x, 3, 1.0, 20),
    ):
        assert gate(logits())[1].shape == (S, E, 20)
        l_aux, combine, _, _ = gate(torch.zeros(0, E))
        assert combine.shape == (0, E, 20) and l_aux == 0


def test_noise_is_for_training_alone() -> None:
    x = torch.randn(S, 6)
    for policy in ("Jitter", "RSample"):
        gate = TopKGate(6, E, noisy_gate_policy=policy, use_rts=False)
        first, again = gate(x)[1], gate(x)[1]
        assert not torch.equal(first, again)
        gate.eval()
        assert torch.equal(gate(x)[1], gate(x)[1])


def test_a_gate_multiplies_in_fp32_whatever_the_model_is() -> None:
    gate = TopKGate(6, E, k=2, top2_2nd_expert_sampling=False)
    x = torch.randn(S, 6)
    expected = gate(x.bfloat16().float())[1]
    gate.wg.weight.data = gate.wg.weight.data.bfloat16().float()
    expected = gate(x.bfloat16().float())[1]
    assert torch.equal(gate.bfloat16()(x.bfloat16())[1], expected)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: topkgating(logits(), 3, 1.0, 0, drop_policy="other"), "Invalid drop_policy: 'other'"),
        (lambda: TopKGate(6, E, k=5), "k = 5 of 4 experts"),
        (lambda: TopKGate(6, E, k=0), "k = 0 of 4 experts"),
        (lambda: TopKGate(6, E, k=1.5), "k = 1.5 is a float, not an integer"),  # type: ignore[arg-type]
        (lambda: TopKGate(6, E, k=True), "k = True is a bool, not an integer"),
        (lambda: TopKGate(0, E), "hidden_size = 0 is no width of tokens"),
        (lambda: TopKGate(6, E)(torch.zeros(S, 7)), r"hidden_size = 6 was given tokens \[13, 7\], of width 7"),
        (lambda: TopKGate(6, E, min_capacity=-3), "min_capacity = -3 is no number of tokens"),
        (lambda: TopKGate(6, E, min_capacity="x"), "min_capacity = 'x' is no number of tokens"),  # type: ignore[arg-type]
        (lambda: TopKGate(6, E, capacity_factor=0.0), "capacity_factor = 0.0: experts would take no token"),
        (lambda: TopKGate(6, E, noisy_gate_policy="gauss"), "Unsupported noisy_gate_policy: 'gauss'"),
        (lambda: TopKGate(6, E, k=2)(torch.zeros(S, 6), torch.ones(S)), "used_token is for k = 1"),
    ],
)
def test_what_cannot_be_is_refused_in_words(call: object, text: str) -> None:
    with pytest.raises((ValueError, AssertionError), match=text):
        call()  # type: ignore[operator]


def test_rows_on_the_wire_of_even_routing() -> None:
    assert [round(n, 3) for n in rows_on_the_wire(8, 2, 2)] == [0.786, 1.0]
    assert [round(n, 2) for n in rows_on_the_wire(64, 8, 8)] == [4.75, 7.0]


def drawn(rank: int, world_size: int) -> list[list[int]]:
    """First experts by each policy that draws, from seeds of their own: as in the group, and alone."""
    values = torch.arange(64.0).view(16, 4).sin()
    found = []
    for noise in (Noise(torch.distributed.group.WORLD), Noise()):
        torch.manual_seed(rank)
        routes = [
            top1gating(values, 0.5, 1, sparse_routes=True, noise=noise),
            top1gating(values, 1.0, 1, None, "RSample", drop_tokens=False, sparse_routes=True, noise=noise),
            top2gating(values, 1.0, 1, drop_tokens=False, sparse_routes=True, noise=noise),
        ]
        found.append([index for each in routes for index in each.indices.flatten().tolist()])
    return found


def test_ranks_with_the_same_tokens_draw_the_same() -> None:
    first, second = run_ranks(2, drawn)
    assert first[0] == second[0] == first[1] and second[1] != first[1]
