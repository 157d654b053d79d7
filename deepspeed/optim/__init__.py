"""What moves parameters: optimizers that work on shards as on whole parameters, and learning-rate schedules.

    build               from the configuration to an optimizer; arguments, ranges: its settings, checked
    traits              what an optimizer must see of a parameter, and how it asks when it is given pieces
    adam, lamb, lion, adagrad, sgd, muon     a file each
    cpu                 base of those whose parameters rest in main memory
    kernels             the element-wise arithmetic, on lists of tensors
    onebit_adam, onebit_lamb, zero_one_adam  optimizers that average by themselves; compressed: what they share
    first_states        states that a class makes when it is constructed
    schedules           learning-rate schedules; schedule_formulas: as functions of the step (pure)

ZeRO steps them on runs (`zero.runs`); the names below are those that scripts import.
"""

from deepspeed.optim.adagrad import DeepSpeedCPUAdagrad
from deepspeed.optim.adam import DeepSpeedCPUAdam, FusedAdam
from deepspeed.optim.build import build_optimizer
from deepspeed.optim.lamb import FusedLamb
from deepspeed.optim.lion import DeepSpeedCPULion, FusedLion
from deepspeed.optim.muon import Muon, MuonWithAuxAdam, split_for_muon
from deepspeed.optim.schedules import build_scheduler
from deepspeed.optim.sgd import DeepSpeedCPUSGD
from deepspeed.optim.traits import FusedRun, Needs, RunPiece, Sharding, StepsFused, needs_of

__all__ = [
    "DeepSpeedCPUAdagrad",
    "DeepSpeedCPUAdam",
    "DeepSpeedCPULion",
    "DeepSpeedCPUSGD",
    "FusedAdam",
    "FusedLamb",
    "FusedLion",
    "FusedRun",
    "Muon",
    "MuonWithAuxAdam",
    "Needs",
    "RunPiece",
    "Sharding",
    "StepsFused",
    "build_optimizer",
    "build_scheduler",
    "needs_of",
    "split_for_muon",
]
