"""The named schedules: each makes the `Actions` of all ranks from numbers of ranks and micro-batches. Pure.

    gpipe.py         all forwards, then all backwards
    one_f_one_b.py   one forward, one backward; interleaved where a rank has several stages
    zero_bubble.py   ZB-H1, ZB-H2, ZB-V: the backward in two halves, weight gradients where a rank would wait
    dual_pipe.py     DualPipeV
    inference.py     forwards alone

`NAMED` is the table behind the configuration's names.
"""

from __future__ import annotations

from collections.abc import Callable

from deepspeed.parallel.pipeline.actions import Actions
from deepspeed.parallel.pipeline.schedules.dual_pipe import dual_pipe_v
from deepspeed.parallel.pipeline.schedules.gpipe import gpipe
from deepspeed.parallel.pipeline.schedules.inference import inference
from deepspeed.parallel.pipeline.schedules.one_f_one_b import interleaved, one_f_one_b
from deepspeed.parallel.pipeline.schedules.zero_bubble import zb_h1, zb_h2, zb_v

__all__ = ["NAMED", "dual_pipe_v", "gpipe", "inference", "interleaved", "one_f_one_b", "zb_h1", "zb_h2", "zb_v"]

NAMED: dict[str, Callable[..., Actions]] = {
    "gpipe": gpipe,
    "1f1b": one_f_one_b,
    "interleaved": interleaved,
    "zb-h1": zb_h1,
    "zb-h2": zb_h2,
    "zb-v": zb_v,
    "dualpipe-v": dual_pipe_v,
}
"""Schedules that train; `interleaved` and `zb-h1` also take `num_chunks`, the stages per rank."""
