"""Events for Comet. What the section leaves out comes from Comet's own settings."""

from __future__ import annotations

from collections.abc import Sequence

from deepspeed.config.monitors import CometConfig
from deepspeed.monitor.backend import Event, Monitor
from deepspeed.utils.logging import current_rank


class CometBackend:
    """One experiment. Of each quantity, an event every `samples_log_interval` samples at the most."""

    def __init__(self, config: CometConfig) -> None:
        try:
            import comet_ml
        except ImportError as error:
            raise ImportError("the package comet_ml is missing. pip install comet_ml") from error
        self._interval = config.samples_log_interval
        self._last: dict[str, int] = {}
        self.experiment = comet_ml.start(
            api_key=config.api_key,
            project=config.project,
            workspace=config.workspace,
            experiment_key=config.experiment_key,
            mode=config.mode,
            online=config.online,
        )
        if config.experiment_name is not None:
            self.experiment.set_name(config.experiment_name)

    def write(self, events: Sequence[Event]) -> None:
        """See Backend."""
        for name, value, step in events:
            last = self._last.get(name)
            if last is None or step - last >= self._interval:
                self._last[name] = step
                self.experiment.log_metric(name=name, value=value, step=step)

    def close(self) -> None:
        """See Backend."""
        self.experiment.end()


class CometMonitor(Monitor):
    """`comet`."""

    def __init__(self, comet_config: CometConfig) -> None:
        enabled = comet_config.enabled and current_rank() == 0
        super().__init__(lambda: CometBackend(comet_config), enabled=enabled, name="comet")
