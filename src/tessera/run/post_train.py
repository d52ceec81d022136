"""What post_train.py calls: decoder post-training on a generator's own tokens, measured before and after."""

import json
import logging
import os
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from torch import nn

from tessera.distributed import barrier, rank
from tessera.errors import ConfigError
from tessera.run.build import LAST, build_trainer, make, plain, prepare, read_checkpoint
from tessera.run.fit import fit
from tessera.run.load import WEIGHTS, check_classes, check_token_space, load_discriminator, load_tokenizer
from tessera.run.pairs import PairSettings, described, given_pairs, tokens_of_pairs
from tessera.run.results import figures_of, log_figures, read_results, write_json, write_results
from tessera.run.strict import check_config
from tessera.run.tokens import TokenSource, content_key, weights_fingerprint
from tessera.stages.evaluation import Evaluation
from tessera.tokenizers import Tokenizer

log = logging.getLogger(__name__)


def post_train(cfg: DictConfig) -> dict[str, Any]:
    """Post-train a tokenizer's decoder, resuming where asked.

    The generator's tokens for gFID are sampled once, before training; decoding the same tokens with the old and the
    new decoders makes their difference free of sampling noise.

    Args:
        cfg: composed from conf/post_train.yaml.

    Returns:
        What `results.json` holds: the figures of the decoder before training, and of the raw and averaged ones after;
        the pairs, the training's wall seconds, with `stage.source=reencode` the share of tokens that came back, and
        with early stopping which weights it published.
    """
    check_config(cfg, "post_train")
    run = prepare(cfg)
    if cfg.ckpt == "auto" and (found := read_results(run)) is not None and "before" in found["figures"]:
        log.info("%s is finished; its results are in %s", cfg.name, run)
        return found
    tokenizer = make(cfg.tokenizer)
    images = make(cfg.data.dataset)(split="train")
    generator = the_generator(cfg, tokenizer, images)
    pairs, source = pairs_for(cfg, images, tokenizer, generator)
    stage = make(cfg.stage)(tokenizer=tokenizer)  # refuses what it can't train before anything is measured
    stage.train()  # loaded models are in eval mode, and Lightning leaves modes as they are
    measure = Measurement(cfg, run, generator)
    before = measure.before(tokenizer)
    configure_gfid(cfg, measure.tokens)
    if cfg.load_discriminator and load_discriminator(stage, cfg.tokenizer.path):
        stage.discriminator_warmup_steps = 0  # it knows real images already
    datamodule = make(cfg.data)(serve="pairs", token_cache=pairs, expected_fingerprint=tokenizer.fingerprint())
    results = fit(cfg, run, stage, datamodule, {"tokenizer": tokenizer.architecture}, source)
    if results["stopped_by"] is None:
        agreement = stage.reencoded_agreement()
        after = {f"after_{kind}": measure(load_tokenizer(run / LAST, kind), f"after_{kind}") for kind in WEIGHTS}
        results = {**results, "pairs": described(pairs), "source": stage.source}
        if agreement is not None:
            results["reencoded_agreement"] = agreement
        if (published := read_checkpoint(run / LAST).get("published")) is not None:
            results["published"] = {"step": published["step"], "gFID": published["value"]}
        results["figures"] = {"before": before, **after}
        if rank() == 0:
            write_results(run, results)
    return results


def the_generator(cfg: DictConfig, tokenizer: Tokenizer, images: Any) -> nn.Module | None:
    """The generator whose tokens are trained on; None where finished pairs are given instead.

    Raises:
        ConfigError: neither is given; other classes than the data set's.
        CheckpointError: a generator of another token space.
    """
    if cfg.generator.path is None:
        if cfg.pairs.path is None:
            raise ConfigError("generator.path is required; set generator.path=..., or pairs.path=... to finished pairs")
        return None
    generator = make(cfg.generator)
    check_token_space(generator, tokenizer, cfg.tokenizer.path)
    check_classes(generator, images)
    return generator


def pairs_for(
    cfg: DictConfig, images: Any, tokenizer: Tokenizer, generator: nn.Module | None
) -> tuple[Path, TokenSource | None]:
    """Folder of the pairs, and what makes them where they may not be complete.

    Raises:
        ConfigError: settings of pairs that are given; values out of range.
        MissingFileError, CheckpointError: see `given_pairs`.
    """
    chosen = plain(cfg.pairs)
    path, batch_size, num_workers = chosen.pop("path"), chosen.pop("batch_size"), cfg.data.get("num_workers", 0)
    if path is not None:
        refuse_ignored_settings(path)
        return Path(path), given_pairs(path, images, tokenizer, generator, batch_size, num_workers)
    root, settings, sampling = Path(cfg.paths.tokens), PairSettings(**chosen), make(cfg.sampling)
    source = tokens_of_pairs(root, images, tokenizer, generator, sampling, settings, batch_size, num_workers)
    return source.folder, source


def refuse_ignored_settings(path: str) -> None:
    """Pairs that exist are what they are: settings on the command line would change nothing.

    Raises:
        ConfigError: names the first such setting.
    """
    for choice in HydraConfig.get().overrides.task if HydraConfig.initialized() else ():
        key = choice.split("=")[0].lstrip("+")
        if key in ("pairs.sigma", "pairs.draws", "pairs.num_images"):
            raise ConfigError(f"{choice} has no effect on pairs.path={path}, which has its own; leave one of them out")


def configure_gfid(cfg: DictConfig, tokens: Path | None) -> None:
    """Let gFID in training decode the fixed tokens, and early stopping, where it is on, take its place.

    Args:
        cfg: changed; where there are no tokens, gFID is left out.
        tokens: file of the generated tokens.

    Raises:
        ConfigError: early stopping without gFID or without tokens.
    """
    early_stopping = plain(cfg.early_stopping)
    callbacks = cfg.callbacks or {}
    gfid = callbacks.get("gfid")
    if gfid is not None and gfid.get("tokens") is None:
        if tokens is None:
            log.info("no gFID in training: generator.path isn't given")
            callbacks.gfid = gfid = None
        else:
            OmegaConf.update(cfg, "callbacks.gfid.tokens", str(tokens), force_add=True)
    if early_stopping["patience"] is None:
        return
    if gfid is None:
        raise ConfigError(
            f"early_stopping.patience={early_stopping['patience']} needs gFID in training; keep callbacks.gfid, and "
            "give generator.path=... or callbacks.gfid.tokens=..."
        )
    node = {"_target_": "tessera.callbacks.EarlyStopping", "gfid": plain(cfg.callbacks.gfid), **early_stopping}
    callbacks.gfid = None
    OmegaConf.update(cfg, "callbacks.early_stopping", node, force_add=True)


class Measurement:
    """Measures decoders on the same validation images and the same generated tokens.

    Args:
        cfg: the run's configuration; `figures` are the callbacks to measure with.
        run: the run folder, which keeps the tokens and the figures of before.
        generator: makes the tokens, in the first measurement; None: gFID is measured where its configuration names a
            file of tokens.

    Attributes:
        tokens: file of the generated tokens; None where there are none.
    """

    def __init__(self, cfg: DictConfig, run: Path, generator: nn.Module | None):
        self.cfg, self.run, self.generator = cfg, run, generator
        self.sampling = None if generator is None else make(cfg.sampling)
        gfid = cfg.figures.get("gfid") or {}
        given = gfid.get("tokens")
        self.tokens = None if given is None else Path(given)
        if self.tokens is None and generator is not None and gfid:
            self.tokens = run / "samples.safetensors"

    def before(self, tokenizer: nn.Module) -> list[dict[str, Any]]:
        """Figures of the decoder before training; a run that is continued finds them in its folder."""
        facts = [plain(self.cfg[key]) for key in ("figures", "data", "sampling", "seed")] + [self.cfg.pairs.seed]
        models = [weights_fingerprint(tokenizer), self.generator and weights_fingerprint(self.generator)]
        key = content_key(facts, models, self.cfg.trainer.get("limit_val_batches"))
        path = self.run / "before.json"
        if path.exists() and (found := json.loads(path.read_text()))["key"] == key:
            log.info("figures of before from %s", path)
            return found["figures"]
        figures = self(tokenizer, "before")
        if rank() == 0:
            write_json(path, {"key": key, "figures": figures})
        return figures

    def __call__(self, tokenizer: nn.Module, when: str) -> list[dict[str, Any]]:
        """Figures of a tokenizer's decoder; `when` begins the names of log keys and pictures."""
        stage = Evaluation(tokenizer, self.generator, self.sampling, self.cfg.pairs.seed)
        fresh = self.run / "samples.safetensors.part"  # what a run leaves that is killed while it writes
        sampled = self.tokens is not None and not self.tokens.exists()
        tokens = {"save_tokens": str(fresh)} if sampled else {"tokens": str(self.tokens)}
        callbacks = []
        for name, node in self.cfg.figures.items():
            if node is None:  # switched off
                continue
            if name != "gfid":
                callbacks.append(make({**plain(node), "prefix": when}))
            elif self.tokens is not None:
                callbacks.append(make({**plain(node), "prefix": when, **tokens}))
        callbacks = [callback for callback in callbacks if callback]
        trainer = build_trainer(self.cfg, callbacks)
        trainer.validate(stage, make(self.cfg.data)(serve="images"), verbose=False)
        if sampled:
            if rank() == 0:
                os.replace(fresh, self.tokens)
            barrier()
        figures = figures_of(callbacks)
        if rank() == 0:
            log.info("%s:", when)
            log_figures(figures)
        return [figure.to_dict() for figure in figures]
