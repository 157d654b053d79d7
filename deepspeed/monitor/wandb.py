"""Events for Weights & Biases. Offline, account and folder are its own settings (WANDB_MODE, WANDB_DIR, ...)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from deepspeed.config.monitors import WandbConfig
from deepspeed.monitor.backend import Event, Monitor
from deepspeed.utils.logging import current_rank


class WandbBackend:
    """One run: the one that is active already, or one of our own."""

    def __init__(self, config: WandbConfig) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ImportError("the package wandb is missing. pip install wandb") from error
        self._is_own = wandb.run is None
        self.run = wandb.run or wandb.init(project=config.project, group=config.group, entity=config.team)

    def write(self, events: Sequence[Event]) -> None:
        """See Backend. Events of one step go as one row: W&B drops a row whose step is not later than the last."""
        for step, same_step in itertools.groupby(
            sorted(events, key=lambda event: event.step), lambda event: event.step
        ):
            self.run.log({event.name: event.value for event in same_step}, step=step)

    def close(self) -> None:
        """See Backend."""
        if self._is_own:
            self.run.finish()


class WandbMonitor(Monitor):
    """`wandb`."""

    def __init__(self, wandb_config: WandbConfig) -> None:
        enabled = wandb_config.enabled and current_rank() == 0
        super().__init__(lambda: WandbBackend(wandb_config), enabled=enabled, name="wandb")
