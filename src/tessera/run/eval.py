"""What eval.py calls: measure a checkpoint and write results.json."""

import logging
import time
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from tessera.callbacks import GenerationFID
from tessera.distributed import rank
from tessera.errors import ConfigError
from tessera.metrics.protocol import Figure
from tessera.run.build import build_trainer, make, prepare, read_checkpoint
from tessera.run.linear_probe import LinearProbing
from tessera.run.load import check_token_space, load_generator, load_tokenizer
from tessera.run.record import save_record
from tessera.run.results import figures_of, write_results
from tessera.run.strict import check_config
from tessera.stages.evaluation import Evaluation

log = logging.getLogger(__name__)


def evaluate(cfg: DictConfig) -> dict[str, Any]:
    """Measure the figures in `cfg.callbacks` on a checkpoint, or what `cfg.task` measures instead.

    Args:
        cfg: composed from conf/eval.yaml. `ckpt` is a tokenizer's or a generator's, or an exported tokenizer's folder;
            `data` and `metrics` default to those it was trained with, which an export doesn't know; `tokenizer_ckpt`
            decodes a generator's tokens (default: the tokenizer it was trained with).

    Returns:
        What `results.json` in the run folder holds.
    """
    check_config(cfg, "eval")
    adopt_training_config(cfg)
    run = prepare(cfg)
    record = save_record(cfg, run)
    task = make(cfg.task)
    start = time.perf_counter()
    figures = measure_figures(cfg) if task is None else probe(cfg, task)
    results = {
        "name": cfg.name,
        "checkpoint": str(cfg.ckpt),
        "tokenizer_checkpoint": cfg.tokenizer_ckpt,
        "weights": cfg.weights,
        "seconds": round(time.perf_counter() - start, 2),
        "figures": [figure.to_dict() for figure in figures],
        "git": record.get("git"),
    }
    if rank() == 0:
        path = write_results(run, results)
        for figure in results["figures"]:
            log.info("%s = %.4f", figure["label"], figure["value"])
        log.info("written to %s", path)
    return results


def measure_figures(cfg: DictConfig) -> list[Figure]:
    """Validate once, with the callbacks that apply to what the checkpoint holds."""
    stage = build_evaluation(cfg)
    callbacks = [callback for callback in (make(node) for node in (cfg.callbacks or {}).values()) if callback]
    if stage.generator is None:
        callbacks = [callback for callback in callbacks if not isinstance(callback, GenerationFID)]
    trainer = build_trainer(cfg, callbacks)
    trainer.validate(stage, make(cfg.data)(serve="images"), verbose=False)
    return figures_of(callbacks)


def probe(cfg: DictConfig, task: LinearProbing) -> list[Figure]:
    """Run a linear probe on a tokenizer's checkpoint.

    Raises:
        ConfigError: the checkpoint is a generator's.
    """
    if holds_generator(cfg.ckpt):
        raise ConfigError(f"task=linear_probe needs a tokenizer's checkpoint; ckpt={cfg.ckpt} is a generator's")
    tokenizer = load_tokenizer(cfg.ckpt, cfg.weights)
    return task.run(tokenizer, make(cfg.data)(serve="images"), build_trainer(cfg, []), cfg.seed)


def holds_generator(path: str) -> bool:
    """Whether a checkpoint is a generator's; an exported folder is taken for a tokenizer's."""
    return not Path(path).is_dir() and "generator" in read_checkpoint(path)["tessera"]["architecture"]


def adopt_training_config(cfg: DictConfig) -> None:
    """Fill `data`, `metrics` and a generator's `sampling` from the checkpoint where the evaluation leaves them open.

    Raises:
        ConfigError: an exported folder, which doesn't say what it was trained on, and no choice of data and metrics.
    """
    if Path(cfg.ckpt).is_dir():
        if open_ones := [key for key in ("data", "metrics") if cfg.get(key) is None]:
            raise ConfigError(
                f"ckpt={cfg.ckpt} is an exported model, which doesn't name what it was trained on; set "
                f"{' and '.join(f'{key}=...' for key in open_ones)}"
            )
        return
    trained = read_checkpoint(cfg.ckpt)["tessera"]["config"]
    for key in ("data", "metrics", "sampling"):
        if cfg.get(key) is None and trained.get(key) is not None:
            OmegaConf.update(cfg, key, trained[key], force_add=True)
    if cfg.tokenizer_ckpt is None and trained.get("generator") is not None:
        cfg.tokenizer_ckpt = trained["tokenizer"]["path"]


def build_evaluation(cfg: DictConfig) -> Evaluation:
    """The models of an evaluation: a tokenizer alone, or a generator with a tokenizer of the same token space."""
    if not holds_generator(cfg.ckpt):
        return Evaluation(load_tokenizer(cfg.ckpt, cfg.weights), seed=cfg.seed)
    generator = load_generator(cfg.ckpt, cfg.weights)
    tokenizer = load_tokenizer(cfg.tokenizer_ckpt)
    check_token_space(generator, tokenizer, cfg.tokenizer_ckpt)
    return Evaluation(tokenizer, generator, make(cfg.sampling), seed=cfg.seed)
