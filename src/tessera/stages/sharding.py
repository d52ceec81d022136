"""Fully sharded training of generators (`trainer=fsdp`): weights and optimizer states are spread over devices."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

from tessera.errors import CheckpointError, ConfigError

SHARDED = "sharded"  # key of a checkpoint; optimizer states are in another order than those of other strategies


class FSDP(ModelParallelStrategy):
    """Fully sharded data parallelism (FSDP2) over all devices of all nodes.

    Checkpoints are single files of whole weights, as other strategies write them, so that evaluation, export and
    `generator.path` read them on any number of devices. Training continues from them with this strategy only, on any
    number of devices too.

    Raises:
        ConfigError: (when training starts) a stage that isn't generator training, averaged weights, or accumulated
            gradients.
    """

    def __init__(self, process_group_backend: str | None = None):
        super().__init__(
            tensor_parallel_size=1, save_distributed_checkpoint=False, process_group_backend=process_group_backend
        )

    def setup_environment(self) -> None:
        stage = self.lightning_module
        if not hasattr(stage, "shard"):
            raise ConfigError("trainer=fsdp is for training generators; choose trainer=ddp, or one device")
        if stage.accumulate_grad_batches > 1:
            raise ConfigError("trainer=fsdp takes no stage.accumulate_grad_batches; choose more devices or trainer=ddp")
        if any(hasattr(callback, "averaged_state_dict") for callback in stage.trainer.callbacks):
            raise ConfigError("callbacks.ema can't average sharded weights; choose callbacks=generator, or trainer=ddp")
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """See the base class.

        Raises:
            CheckpointError: written by another strategy.
        """
        check_strategy(torch.load(checkpoint_path, map_location="cpu", mmap=True, weights_only=True), sharded=True)
        return super().load_checkpoint(checkpoint_path, weights_only)


def is_sharded(trainer: lightning.Trainer) -> bool:
    """Whether a trainer spreads weights over devices."""
    return isinstance(trainer.strategy, FSDP)


def check_strategy(checkpoint: dict[str, Any], sharded: bool) -> None:
    """Refuse to continue a sharded training otherwise, or another one sharded.

    Raises:
        CheckpointError: names the trainer to choose.
    """
    if bool(checkpoint.get(SHARDED)) != sharded:
        choice = "another trainer than fsdp" if sharded else "trainer=fsdp"
        raise CheckpointError(
            f"the checkpoint was written with {choice}, whose optimizer states are in another order; continue with that"
        )


def shard(model: nn.Module, blocks: nn.ModuleList, mesh: DeviceMesh, methods: tuple[str, ...]) -> None:
    """Spread a model's weights over the devices of a mesh, in place: each block by itself, and what remains.

    Args:
        model: of plain weights; left alone where it is sharded already.
        blocks: of the model; gathered one at a time when they run.
        mesh: of one dimension.
        methods: names of the model's methods that run it, besides `forward`.
    """
    if isinstance(model, FSDPModule):
        return
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for name in methods:
        register_fsdp_forward_method(model, name)


def gather(model: nn.Module) -> None:
    """Give every device the whole weights until `scatter`: for running parts of the model, or it on single devices."""
    for module in _shards(model):
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()


def scatter(model: nn.Module) -> None:
    """Undo `gather`."""
    for module in _shards(model):
        module.set_reshard_after_forward(module is not model, recurse=False)
        module.reshard()


def _shards(model: nn.Module) -> Iterator[FSDPModule]:
    return (module for module in model.modules() if isinstance(module, FSDPModule))
