"""`deepspeed.planner.machine` in every rank, with few turns of each comparison: for tests that ask what is measured, not how well."""

from __future__ import annotations

from unittest import mock

from deepspeed.engine import message_costs
from deepspeed.planner import machine

if __name__ == "__main__":
    with mock.patch.multiple(message_costs, PASSES=1, NUM_TURNS=2, NUM_WARM=1):
        machine.main()
