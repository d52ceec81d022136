"""What post_train.py calls: decoder post-training on a generator's own tokens, measured before and after."""

import logging
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from tessera.distributed import rank
from tessera.run.build import LAST, build_trainer, make, prepare
from tessera.run.fit import fit
from tessera.run.load import check_token_space, load_tokenizer
from tessera.run.results import figures_of, read_results, write_results
from tessera.run.strict import check_config
from tessera.run.tokens import tokens_of_pairs
from tessera.stages.evaluation import Evaluation

log = logging.getLogger(__name__)


def post_train(cfg: DictConfig) -> dict[str, Any]:
    """Post-train a tokenizer's decoder, resuming where asked.

    The generator's tokens for gFID are sampled once, before training; decoding the same tokens with the old and the
    new decoders makes their difference free of sampling noise.

    Args:
        cfg: composed from conf/post_train.yaml.

    Returns:
        What `results.json` holds: the figures of the decoder before training, and of the raw and averaged ones after.
    """
    check_config(cfg, "post_train")
    run = prepare(cfg)
    if cfg.ckpt == "auto" and (found := read_results(run)) is not None and "before" in found["figures"]:
        log.info("%s is finished; its results are in %s", cfg.name, run)
        return found
    tokenizer, generator = make(cfg.tokenizer), make(cfg.generator)
    check_token_space(generator, tokenizer, cfg.tokenizer.path)
    sampling = make(cfg.sampling)
    images = make(cfg.data.dataset)(split="train")
    source = tokens_of_pairs(
        Path(cfg.paths.tokens),
        images,
        tokenizer,
        generator,
        sampling,
        cfg.pairs.sigma,
        cfg.pairs.seed,
        cfg.pairs.batch_size,
    )
    architecture = {"tokenizer": tokenizer.architecture}
    measure = Measurement(cfg, generator, sampling)
    before = measure(tokenizer)
    stage = make(cfg.stage)(tokenizer=tokenizer)
    datamodule = make(cfg.data)(serve="pairs", token_cache=source.folder, expected_fingerprint=tokenizer.fingerprint())
    results = fit(cfg, run, stage, datamodule, architecture, source)
    if results["stopped_by"] is None:
        after = {weights: measure(load_tokenizer(run / LAST, weights)) for weights in ("raw", "ema")}
        results = {
            **results,
            "figures": {"before": before, **{f"after_{name}": value for name, value in after.items()}},
        }
        if rank() == 0:
            write_results(run, results)
    return results


class Measurement:
    """Measures decoders on the same validation images and the same generated tokens.

    Args:
        cfg: the run's configuration; `figures` are the callbacks to measure with.
        generator: makes the tokens on the first call.
        sampling: its settings.
    """

    def __init__(self, cfg: DictConfig, generator: torch.nn.Module, sampling: Any):
        self.cfg, self.generator, self.sampling = cfg, generator, sampling
        self.generated: dict[bytes, torch.Tensor] = {}

    def __call__(self, tokenizer: torch.nn.Module) -> list[dict[str, Any]]:
        stage = Evaluation(tokenizer, self.generator, self.sampling, self.cfg.pairs.seed, self.generated)
        callbacks = [make(node) for node in self.cfg.figures.values()]
        trainer = build_trainer(self.cfg, callbacks)
        trainer.validate(stage, make(self.cfg.data)(serve="images"), verbose=False)
        return [figure.to_dict() for figure in figures_of(callbacks)]
