"""What train.py calls: tokenizer main-training, or generator training on a tokenizer's tokens."""

from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from tessera.data import ImageDataset, TokenCache
from tessera.data.views import Views
from tessera.errors import ConfigError
from tessera.run.build import make, plain, prepare
from tessera.run.fit import fit
from tessera.run.strict import check_config
from tessera.run.tokens import tokens_of_images
from tessera.tokenizers import Tokenizer


def train(cfg: DictConfig) -> dict[str, Any]:
    """Train as configured, resuming where asked.

    Args:
        cfg: composed from conf/train.yaml.

    Returns:
        What `results.json` in the run folder holds.
    """
    check_config(cfg, "train")
    run = prepare(cfg)
    if cfg.get("generator") is None:
        return train_tokenizer(cfg, run)
    return train_generator(cfg, run)


def train_tokenizer(cfg: DictConfig, run: Path) -> dict[str, Any]:
    """Main-training of a new tokenizer, or of one that `tokenizer.path` gives (fine-tuning)."""
    _refuse_ignored_parts(cfg)
    tokenizer = make(cfg.tokenizer)
    architecture = {"tokenizer": getattr(tokenizer, "architecture", None) or plain(cfg.tokenizer)}
    tokenizer.train()  # a loaded one is in eval mode, and Lightning leaves modes as they are
    stage = make(cfg.stage)(tokenizer=tokenizer)
    return fit(cfg, run, stage, make(cfg.data)(), architecture)


def _refuse_ignored_parts(cfg: DictConfig) -> None:
    """A trained tokenizer keeps its parts: choices of others on the command line would change nothing.

    Raises:
        ConfigError: names the first such choice.
    """
    if "path" not in cfg.tokenizer or not HydraConfig.initialized():
        return
    for choice in HydraConfig.get().overrides.task:
        if choice.split("=")[0].lstrip("+").split("/")[0].split(".")[0] in ("backbone", "quantizer"):
            raise ConfigError(
                f"{choice} has no effect, as tokenizer.path={cfg.tokenizer.path} has its own backbone and quantizer; "
                "leave it out, or train a new one with tokenizer=default"
            )


def train_generator(cfg: DictConfig, run: Path) -> dict[str, Any]:
    """Generator training on `tokens.path`, or on the tokenizer's tokens, which are made first where they aren't yet."""
    tokenizer = make(cfg.tokenizer)
    data = make(cfg.data)
    images = make(cfg.data.dataset)(split="train" if cfg.tokens.path is None else "val")
    factory = make(cfg.generator)
    sizes = factory.func.sizes(tokenizer.quantizer, images.num_classes)
    generator = factory(**sizes)
    architecture = {"generator": {**plain(cfg.generator), **sizes, "_partial_": False}}
    stage = make(cfg.stage)(generator=generator, tokenizer=tokenizer)
    source = None
    if cfg.tokens.path is None:
        views = Views.of(cfg.tokens.views, cfg.tokens.num_views, cfg.tokens.seed)
        sizes = (cfg.tokens.batch_size, cfg.data.get("num_workers", 0))
        source = tokens_of_images(Path(cfg.paths.tokens), images, tokenizer, views, *sizes)
    folder = given_tokens(cfg.tokens, tokenizer, images) if source is None else source.folder
    datamodule = data(serve="tokens", token_cache=folder, expected_fingerprint=tokenizer.fingerprint())
    return fit(cfg, run, stage, datamodule, architecture, source)


def given_tokens(tokens: DictConfig, tokenizer: Tokenizer, images: ImageDataset) -> Path:
    """The folder of a cache that exists already, such as imported tokens, after checking that it fits.

    Raises:
        ConfigError: views are chosen, which the cache has already; another number of classes than the data set's.
        MissingFileError, CheckpointError: no finished cache of this tokenizer's tokens.
    """
    if tokens.views != "none" or tokens.num_views is not None:
        raise ConfigError(
            f"tokens.views={tokens.views} has no effect on tokens.path={tokens.path}, which has its own; leave it out"
        )
    cache = TokenCache.open(tokens.path, tokenizer_fingerprint=tokenizer.fingerprint(), key="tokens.path")
    if cache.manifest.num_classes != images.num_classes:
        raise ConfigError(
            f"tokens.path={tokens.path} has {cache.manifest.num_classes} classes, but the data set {images.name} has "
            f"{images.num_classes}; set data=... to the one the tokens were made of"
        )
    return Path(tokens.path)
