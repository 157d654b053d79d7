"""`deepspeed.OnDevice`: build modules on a device, in a dtype, without visiting the CPU (or at all: "meta")."""

from __future__ import annotations

from types import TracebackType

import torch


class OnDevice:
    """Context: tensors made inside are on `device`, floating ones of default dtype in `dtype`."""

    def __init__(self, dtype: torch.dtype, device: str | torch.device = "meta", enabled: bool = True) -> None:
        self.dtype, self.device, self.enabled = dtype, torch.device(device), enabled

    def __enter__(self) -> OnDevice:
        if self.enabled:
            self._before = torch.get_default_dtype()
            torch.set_default_dtype(self.dtype)
            self.device.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.enabled:
            self.device.__exit__(kind, error, traceback)
            torch.set_default_dtype(self._before)
