"""Optimisation: parameter groups and learning-rate schedules."""

from tessera.optim.groups import decay_groups, decayed_names
from tessera.optim.schedules import ConstantSchedule, CosineSchedule, LinearSchedule

__all__ = ["ConstantSchedule", "CosineSchedule", "LinearSchedule", "decay_groups", "decayed_names"]
