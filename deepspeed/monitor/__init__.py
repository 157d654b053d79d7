"""What a run tells the world: events for other tools, a record of its own, one line per N steps, reports of them.

backend.py       what a destination of events is; a failing one never stops training
csv_monitor.py   CSV files
tensorboard.py   TensorBoard
wandb.py         Weights & Biases
comet.py         Comet
master.py        MonitorMaster: all that the configuration asks for, on rank 0
run_record.py    run.jsonl in the run directory: written by a run, read by reports
step.py          one step in numbers
stretch.py       the steps between two progress lines, added up
line.py          the progress line
trace.py         a trace for Chrome and Perfetto
report.py        `deepspeed report`: a page from records
top.py           `deepspeed top`: the same in a terminal
"""

from deepspeed.utils.lazy import invert as _invert
from deepspeed.utils.lazy import lazy_exports as _lazy_exports

__getattr__, __dir__ = _lazy_exports(
    __name__,
    _invert(
        {
            "deepspeed.monitor.backend": "Backend Event Monitor",
            "deepspeed.monitor.master": "MonitorMaster",
            "deepspeed.monitor.csv_monitor": "csvMonitor",
            "deepspeed.monitor.tensorboard": "TensorBoardMonitor",
            "deepspeed.monitor.wandb": "WandbMonitor",
            "deepspeed.monitor.comet": "CometMonitor",
        }
    )
    | {name: f"deepspeed.monitor.{name}:" for name in "comet config csv_monitor monitor tensorboard wandb".split()},
)
