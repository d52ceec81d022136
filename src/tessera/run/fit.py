"""The part all trainings share: trainer, callbacks, resuming, records and results."""

import logging
import time
from pathlib import Path
from typing import Any

import lightning
from omegaconf import DictConfig

from tessera.distributed import rank
from tessera.run.build import LAST, SaveRecord, build_trainer, make, read_checkpoint, resume_path
from tessera.run.record import save_record
from tessera.run.results import figures_of, read_results, write_results
from tessera.run.tokens import BuildTokens, TokenSource

log = logging.getLogger(__name__)


def fit(
    cfg: DictConfig,
    run: Path,
    stage: lightning.LightningModule,
    datamodule: lightning.LightningDataModule,
    architecture: dict[str, Any],
    source: TokenSource | None = None,
) -> dict[str, Any]:
    """Train `stage`, leave `checkpoints/last.ckpt` and `results.json` in the run folder, and return the results.

    Args:
        cfg: the whole configuration.
        run: the run folder.
        stage: what is trained.
        datamodule: serves what the stage asks for.
        architecture: per model the config node that rebuilds it; goes into the checkpoints.
        source: tokens to make before the loaders open their cache.
    """
    ckpt_path = resume_path(cfg.ckpt, run)
    finished = ckpt_path is not None and read_checkpoint(ckpt_path)["global_step"] >= cfg.trainer.max_steps > 0
    if finished and (found := read_results(run)) is not None:
        log.info("%s is finished; its results are in %s", cfg.name, run)
        return found
    record = {**save_record(cfg, run), "tokenizer_fingerprint": stage.tokenizer.fingerprint()}
    callbacks = [SaveRecord(record, architecture)]
    if source is not None:
        callbacks.append(BuildTokens(source))
    callbacks += [callback for callback in (make(node) for node in (cfg.callbacks or {}).values()) if callback]
    trainer = build_trainer(cfg, callbacks)
    start = time.perf_counter()
    trainer.fit(stage, datamodule, ckpt_path=ckpt_path, weights_only=True)
    if finished:  # it was stopped after its last step, before its last validation
        trainer.validate(stage, datamodule, verbose=False)
    seconds = time.perf_counter() - start
    stopped_by = next((callback.stopped_by for callback in callbacks if getattr(callback, "stopped_by", None)), None)
    results = {
        "name": cfg.name,
        "steps": trainer.global_step,
        "seconds": round(seconds, 2),
        "stopped_by": stopped_by,
        "checkpoint": str(run / LAST),
        "figures": [figure.to_dict() for figure in figures_of(callbacks)],
        "git": record.get("git"),
    }
    if rank() == 0:
        write_results(run, results)
    return results
