"""What a dtype policy changes: loss scales, autocast, and matrix products on CPUs without low-precision units."""

from deepspeed.precision.scaler import DynamicLossScale, LossScaleFloorError, StaticLossScale
from deepspeed.precision.widen import WideMatmul, Widening, needs_wide_matmul

__all__ = ["DynamicLossScale", "LossScaleFloorError", "StaticLossScale", "WideMatmul", "Widening", "needs_wide_matmul"]
