"""What eval.py calls: measure a checkpoint and write results.json."""

import logging
import time
from typing import Any

from omegaconf import DictConfig, OmegaConf

from tessera.callbacks import GenerationFID
from tessera.distributed import rank
from tessera.run.build import build_trainer, make, prepare, read_checkpoint
from tessera.run.load import check_token_space, load_generator, load_tokenizer
from tessera.run.record import save_record
from tessera.run.results import figures_of, write_results
from tessera.run.strict import check_config
from tessera.stages.evaluation import Evaluation

log = logging.getLogger(__name__)


def evaluate(cfg: DictConfig) -> dict[str, Any]:
    """Measure the figures in `cfg.callbacks` on a checkpoint.

    Args:
        cfg: composed from conf/eval.yaml. `ckpt` is a tokenizer's or a generator's; `data` and `metrics` default to
            those it was trained with; `tokenizer_ckpt` decodes a generator's tokens (default: the tokenizer it was
            trained with).

    Returns:
        What `results.json` in the run folder holds.
    """
    check_config(cfg, "eval")
    adopt_training_config(cfg)
    run = prepare(cfg)
    record = save_record(cfg, run)
    stage = build_evaluation(cfg)
    callbacks = [callback for callback in (make(node) for node in (cfg.callbacks or {}).values()) if callback]
    if stage.generator is None:
        callbacks = [callback for callback in callbacks if not isinstance(callback, GenerationFID)]
    datamodule = make(cfg.data)(serve="images")
    trainer = build_trainer(cfg, callbacks)
    start = time.perf_counter()
    trainer.validate(stage, datamodule, verbose=False)
    results = {
        "name": cfg.name,
        "checkpoint": str(cfg.ckpt),
        "tokenizer_checkpoint": cfg.tokenizer_ckpt,
        "weights": cfg.weights,
        "seconds": round(time.perf_counter() - start, 2),
        "figures": [figure.to_dict() for figure in figures_of(callbacks)],
        "git": record.get("git"),
    }
    if rank() == 0:
        path = write_results(run, results)
        for figure in results["figures"]:
            log.info("%s = %.4f", figure["label"], figure["value"])
        log.info("written to %s", path)
    return results


def adopt_training_config(cfg: DictConfig) -> None:
    """Fill `data`, `metrics` and a generator's `sampling` from the checkpoint where the evaluation leaves them open."""
    trained = read_checkpoint(cfg.ckpt)["tessera"]["config"]
    for key in ("data", "metrics", "sampling"):
        if cfg.get(key) is None and trained.get(key) is not None:
            OmegaConf.update(cfg, key, trained[key], force_add=True)
    if cfg.tokenizer_ckpt is None and trained.get("generator") is not None:
        cfg.tokenizer_ckpt = trained["tokenizer"]["path"]


def build_evaluation(cfg: DictConfig) -> Evaluation:
    """The models of an evaluation: a tokenizer alone, or a generator with a tokenizer of the same token space."""
    if "generator" not in read_checkpoint(cfg.ckpt)["tessera"]["architecture"]:
        return Evaluation(load_tokenizer(cfg.ckpt, cfg.weights), seed=cfg.seed)
    generator = load_generator(cfg.ckpt, cfg.weights)
    tokenizer = load_tokenizer(cfg.tokenizer_ckpt)
    check_token_space(generator, tokenizer, cfg.tokenizer_ckpt)
    return Evaluation(tokenizer, generator, make(cfg.sampling), seed=cfg.seed)
