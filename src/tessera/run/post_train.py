"""What post_train.py calls: decoder post-training on a generator's own tokens, measured before and after."""

import logging
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from torch import nn

from tessera.distributed import rank
from tessera.generators.sampling import SamplingConfig
from tessera.run.build import LAST, build_trainer, make, plain, prepare
from tessera.run.fit import fit
from tessera.run.load import WEIGHTS, check_classes, check_token_space, load_discriminator, load_tokenizer
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
    check_classes(generator, images)
    pairs = {**plain(cfg.pairs), "num_workers": cfg.data.get("num_workers", 0)}
    source = tokens_of_pairs(Path(cfg.paths.tokens), images, tokenizer, generator, sampling, **pairs)
    stage = make(cfg.stage)(tokenizer=tokenizer)  # refuses what it can't train before anything is measured
    measure = Measurement(cfg, run / "samples.safetensors", generator, sampling)
    before = measure(tokenizer, "before")
    if "gfid" in (cfg.callbacks or {}):
        OmegaConf.update(cfg, "callbacks.gfid.tokens", str(measure.samples), force_add=True)
    if cfg.load_discriminator and load_discriminator(stage, cfg.tokenizer.path):
        stage.discriminator_warmup_steps = 0  # it knows real images already
    datamodule = make(cfg.data)(serve="pairs", token_cache=source.folder, expected_fingerprint=tokenizer.fingerprint())
    results = fit(cfg, run, stage, datamodule, {"tokenizer": tokenizer.architecture}, source)
    if results["stopped_by"] is None:
        after = {f"after_{kind}": measure(load_tokenizer(run / LAST, kind), f"after_{kind}") for kind in WEIGHTS}
        results = {**results, "figures": {"before": before, **after}}
        if rank() == 0:
            write_results(run, results)
    return results


class Measurement:
    """Measures decoders on the same validation images and the same generated tokens.

    Args:
        cfg: the run's configuration; `figures` are the callbacks to measure with.
        samples: file of the generated tokens; made by the first measurement.
        generator: makes them.
        sampling: its settings.
    """

    def __init__(self, cfg: DictConfig, samples: Path, generator: nn.Module, sampling: SamplingConfig):
        self.cfg, self.samples, self.generator, self.sampling = cfg, samples, generator, sampling

    def __call__(self, tokenizer: nn.Module, when: str) -> list[dict[str, Any]]:
        """Figures of a tokenizer's decoder; `when` begins the names of log keys and pictures."""
        stage = Evaluation(tokenizer, self.generator, self.sampling, self.cfg.pairs.seed)
        callbacks = [make(self._node(name, node, when)) for name, node in self.cfg.figures.items()]
        trainer = build_trainer(self.cfg, callbacks)
        trainer.validate(stage, make(self.cfg.data)(serve="images"), verbose=False)
        return [figure.to_dict() for figure in figures_of(callbacks)]

    def _node(self, name: str, node: DictConfig, when: str) -> dict[str, Any]:
        arguments = {**plain(node), "prefix": when}
        if name == "gfid":
            arguments["tokens" if self.samples.exists() else "save_tokens"] = str(self.samples)
        return arguments
