"""The processes that submitit starts: one per device, on SLURM (`hydra/launcher=slurm`) or here (`local`).

A submitted job is requeued by submitit alone: it sends SIGUSR2 before the time limit, `LastCheckpoint` stops the run
with a checkpoint, and `tessera.cli` hands the signal on to submitit.
"""

import os
from functools import cached_property
from typing import Any

from lightning.pytorch.plugins.environments import ClusterEnvironment

from tessera.errors import ConfigError


def is_submitted() -> bool:
    """Whether submitit started this process."""
    return "SUBMITIT_EXECUTOR" in os.environ


class SubmititEnvironment(ClusterEnvironment):
    """The tasks of a submitit job as Lightning's processes.

    On SLURM Lightning's own environment would requeue the job a second time; on one machine it knows no such tasks.
    """

    @cached_property
    def _job(self) -> Any:
        import submitit

        return submitit.JobEnvironment()

    @property
    def creates_processes_externally(self) -> bool:
        return True

    @property
    def main_address(self) -> str:
        return os.environ.get("MASTER_ADDR") or (
            "127.0.0.1" if self._job.cluster == "local" else self._job.hostnames[0]
        )

    @property
    def main_port(self) -> int:
        # every task has to arrive at the same one, and other jobs on the machine at others
        return int(os.environ.get("MASTER_PORT") or 15000 + int(self._job.raw_job_id) % 15000)

    @staticmethod
    def detect() -> bool:
        return is_submitted()

    def world_size(self) -> int:
        return self._job.num_tasks

    def set_world_size(self, size: int) -> None:
        """Lightning tells what `world_size` said."""

    def global_rank(self) -> int:
        return self._job.global_rank

    def set_global_rank(self, rank: int) -> None:
        """Lightning tells what `global_rank` said."""

    def local_rank(self) -> int:
        return self._job.local_rank

    def node_rank(self) -> int:
        return self._job.node

    def validate_settings(self, num_devices: int, num_nodes: int) -> None:
        """Refuse a trainer of another number of processes than the job has tasks.

        Raises:
            ConfigError: names both.
        """
        if num_devices * num_nodes != self.world_size():
            raise ConfigError(
                f"trainer.devices={num_devices} on trainer.num_nodes={num_nodes} need {num_devices * num_nodes} "
                f"processes, but the job has {self.world_size()}; leave hydra.launcher.tasks_per_node and "
                "hydra.launcher.nodes as they are, or set the trainer's values accordingly"
            )
