"""From configuration to objects: instantiation, run folder, resuming, trainer."""

import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra.utils
import lightning
import torch
from hydra.core.hydra_config import HydraConfig
from lightning.pytorch.callbacks import Callback, Checkpoint, ProgressBar
from omegaconf import DictConfig, OmegaConf

from tessera.errors import CheckpointError, ConfigError, MissingFileError
from tessera.run.launch import SubmititEnvironment, is_submitted
from tessera.run.record import is_first_process

log = logging.getLogger(__name__)

LAST = "checkpoints/last.ckpt"
# Lightning's advice about choices that are made on purpose here
QUIET = (
    ".*LeafSpec.*",
    ".*in eval mode at the start of training.*",
    ".*does not have many workers.*",
    ".*overridden `on_before_batch_transfer`.*",
)


def plain(node: Any) -> Any:
    """A config node as plain containers, interpolations resolved, and parts switched off (`_target_: null`) as None."""
    value = OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
    if isinstance(value, dict):
        if "_target_" in value and value["_target_"] is None:
            return None
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    return value


def make(node: Any) -> Any:
    """Instantiate a config node; None where it is absent or switched off."""
    value = plain(node)
    return None if value is None else hydra.utils.instantiate(value, _convert_="all")


def prepare(cfg: DictConfig) -> Path:
    """Fix the run folder, seeds and threads before anything is built.

    Returns:
        The run folder. In a multirun it is Hydra's job folder, so that jobs never share one.
    """
    if HydraConfig.initialized():
        OmegaConf.update(cfg, "paths.run", HydraConfig.get().runtime.output_dir)
        OmegaConf.update(cfg, "name", cfg.name)  # freeze what is interpolated from Hydra's own node
    torch.set_num_threads(int(cfg.num_threads))
    # hardware lists and tips; what matters to a run comes through its own log lines
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for message in QUIET:
        warnings.filterwarnings("ignore", message=message)
    lightning.seed_everything(int(cfg.seed), workers=True, verbose=False)
    run = Path(cfg.paths.run)
    run.mkdir(parents=True, exist_ok=True)
    return run


def resume_path(ckpt: str | None, run: Path) -> str | None:
    """What `Trainer.fit` continues from.

    Args:
        ckpt: None to start anew, "auto" to continue the run folder's last checkpoint where there is one, or a path.
        run: the run folder.

    Raises:
        ConfigError: starting anew would write over an earlier run.
        MissingFileError: the given checkpoint does not exist.
    """
    last = run / LAST
    if ckpt == "auto":
        if not last.exists():
            log.info("ckpt=auto: no %s yet, starting anew", last)
            return None
        log.info("continuing from %s", last)
        return str(last)
    if ckpt is not None:
        if not Path(ckpt).is_file():
            raise MissingFileError(f"ckpt={ckpt} does not exist; give an existing checkpoint, ckpt=auto, or ckpt=null")
        return str(ckpt)
    # under a launcher the other ranks start after rank 0 has begun to write
    if last.exists() and is_first_process():
        raise ConfigError(
            f"{run} already holds a run; continue it with ckpt=auto, choose another name=..., or delete the folder"
        )
    return None


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a training checkpoint written here.

    Raises:
        MissingFileError: no such file.
        CheckpointError: not a checkpoint of this package.
    """
    if not Path(path).is_file():
        raise MissingFileError(f"checkpoint {path} does not exist; give the path of a .ckpt file")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(
            f"{path} is no checkpoint, or a damaged one ({type(error).__name__}); give a .ckpt file that train.py or "
            "post_train.py wrote"
        ) from error
    if not isinstance(checkpoint, dict) or "tessera" not in checkpoint:
        raise CheckpointError(
            f"{path} was not written by Tessera's training; import published weights through tessera.zoo"
        )
    return checkpoint


class SaveRecord(Callback):
    """Puts what is needed to rebuild a run's models into each checkpoint, as plain values.

    Args:
        record: resolved config, versions, commit and so on (run/record.py).
        architecture: per model (`tokenizer`, `generator`) the config node that builds it.
    """

    def __init__(self, record: dict[str, Any], architecture: dict[str, Any]):
        self.content = {**record, "architecture": architecture}

    def on_save_checkpoint(self, trainer: lightning.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        checkpoint["tessera"] = self.content


def build_trainer(cfg: DictConfig, callbacks: list[Callback]) -> lightning.Trainer:
    """The Lightning trainer of a run, with the configured logger (or none) and callbacks.

    Raises:
        ConfigError: in a submitted job, another number of devices than the job has tasks.
    """
    factory: Callable[..., lightning.Trainer] = hydra.utils.instantiate(
        {**plain(cfg.trainer), "_partial_": True}, _convert_="all"
    )
    environment = SubmititEnvironment() if is_submitted() else None
    processes = {} if environment is None else {"plugins": environment}
    # Lightning adds parts of its own unless told otherwise
    trainer = factory(
        callbacks=callbacks,
        logger=make(cfg.logger) or False,
        enable_checkpointing=_has(callbacks, Checkpoint),
        enable_progress_bar=_has(callbacks, ProgressBar),
        **processes,
    )
    if environment is not None:
        environment.validate_settings(trainer.num_devices, trainer.num_nodes)
    return trainer


def _has(callbacks: list[Callback], kind: type) -> bool:
    return any(isinstance(callback, kind) for callback in callbacks)
