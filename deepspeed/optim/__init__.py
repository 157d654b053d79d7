"""What moves parameters: optimizers that work on shards as on whole parameters, and learning-rate schedules."""

from deepspeed.optim.adagrad import DeepSpeedCPUAdagrad
from deepspeed.optim.adam import DeepSpeedCPUAdam, FusedAdam
from deepspeed.optim.build import build_optimizer
from deepspeed.optim.lamb import FusedLamb
from deepspeed.optim.lion import DeepSpeedCPULion, FusedLion
from deepspeed.optim.muon import Muon, MuonWithAuxAdam, split_for_muon
from deepspeed.optim.schedules import build_scheduler
from deepspeed.optim.sgd import DeepSpeedCPUSGD
from deepspeed.optim.traits import FusedRun, Needs, Piece, Sharding, StepsFused, needs_of

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
    "Piece",
    "Sharding",
    "StepsFused",
    "build_optimizer",
    "build_scheduler",
    "needs_of",
    "split_for_muon",
]
