"""Optimisation: parameter groups and learning-rate schedules."""

from tessera.optim.groups import decay_groups, decayed_names
from tessera.optim.schedules import (
    ConstantSchedule,
    CosineSchedule,
    DropSchedule,
    EpochCosineSchedule,
    HeldSchedule,
    LinearSchedule,
)

__all__ = [
    "ConstantSchedule",
    "CosineSchedule",
    "DropSchedule",
    "EpochCosineSchedule",
    "HeldSchedule",
    "LinearSchedule",
    "decay_groups",
    "decayed_names",
]
