"""The example of long sequences has the losses of whole sequences when two ranks share each of them."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from tests.harness import run_ranks

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "long_sequence" / "train.py"


def run(rank: int, world: int, size: int, kv: int) -> list[float]:
    """The example's `main`."""
    from deepspeed.runtime.sequence_parallel import parallel_state_sp
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

    spec = importlib.util.spec_from_file_location("long_sequence_example", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    try:
        return module.main(f"--sp {size} --seq 64 --steps 4 --width 32 --tile 20 --kv-heads {kv}".split())
    finally:
        UlyssesSPAttentionHF.unregister()
        parallel_state_sp.destroy_sequence_parallel()


def test_two_ranks_that_share_sequences_have_the_losses_of_one() -> None:
    whole = run_ranks(1, run, 1, 2)[0]
    for kv in (2, 1):
        parts = run_ranks(2, run, 2, kv)
        assert parts[0] == parts[1]
        if kv == 2:
            # The whole run's printed loss counts the last token, whose target is nothing, in no sum: both are means.
            assert parts[0] == pytest.approx(whole, rel=2e-5)
