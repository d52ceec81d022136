"""What eval.py calls: run a task on a checkpoint and write results.json."""

import logging
import time
from typing import Any

from omegaconf import DictConfig

from tessera.distributed import rank
from tessera.run.build import make, prepare
from tessera.run.published import adopt_published, beside, reported
from tessera.run.record import save_record
from tessera.run.results import log_figures, write_results
from tessera.run.strict import check_config
from tessera.run.subject import Subject, adopt_training_config

log = logging.getLogger(__name__)


def evaluate(cfg: DictConfig) -> dict[str, Any]:
    """Run `cfg.task`.

    Args:
        cfg: composed from conf/eval.yaml. `ckpt` is a tokenizer's or a generator's, or an exported tokenizer's folder,
            or `zoo` names a published one. `data`, `metrics` and `sampling` default to those it was trained with, of a
            published one to those of its figures; `tokenizer_ckpt` decodes a generator's tokens (default: the tokenizer
            it was trained with).

    Returns:
        What `results.json` in the run folder holds.
    """
    check_config(cfg, "eval")
    adopt_published(cfg)
    adopt_training_config(cfg)
    run = prepare(cfg)
    record = save_record(cfg, run)
    start = time.perf_counter()
    found = make(cfg.task).run(Subject(cfg, run))
    results = {
        "name": cfg.name,
        "checkpoint": None if cfg.ckpt is None else str(cfg.ckpt),
        "tokenizer_checkpoint": cfg.tokenizer_ckpt,
        "weights": cfg.weights,
        "precision": str(cfg.trainer.precision),
        "seconds": round(time.perf_counter() - start, 2),
        "git": record.get("git"),
        **found,
        "figures": [figure.to_dict() for figure in found.get("figures", [])],
    }
    published = reported(cfg)
    if published is not None:
        results["published"] = published
    if rank() == 0:
        path = write_results(run, results)
        log_figures(found.get("figures", []))
        for line in beside(published, results["figures"]) if published is not None else ():
            log.info(line)
        log.info("written to %s", path)
    return results
