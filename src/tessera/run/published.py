"""`eval.py zoo=...`: a published checkpoint, under the conditions its figures were published for."""

import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from tessera.errors import ConfigError
from tessera.run.load import ZOO, is_published, published_entry
from tessera.run.strict import CONF
from tessera.zoo.registry import info

log = logging.getLogger(__name__)

REFERENCES = {256: "VIRTUAL_imagenet256_labeled.npz", 512: "VIRTUAL_imagenet512.npz"}  # of ADM's evaluation
DATA = {"tessera": "digits"}  # by the first part of the name; all others are ImageNet's


def adopt_published(cfg: DictConfig) -> None:
    """Make `zoo` the checkpoint, and fill what is open of `data`, `metrics`, `sampling` and `tokenizer_ckpt`.

    Raises:
        ConfigError: an unknown name; both zoo and ckpt; zoo_path without zoo.
    """
    if cfg.zoo is None:
        if cfg.zoo_path is not None:
            raise ConfigError(f"zoo_path={cfg.zoo_path} has no effect without zoo=<name>, which says what the file is")
        return
    if cfg.ckpt is not None:
        raise ConfigError(f"zoo={cfg.zoo} and ckpt={cfg.ckpt} are both models; leave one of them out")
    entry = info(cfg.zoo)
    cfg.ckpt = f"{ZOO}{entry.name}" + ("" if cfg.zoo_path is None else f"@{cfg.zoo_path}")
    if cfg.tokenizer_ckpt is None and entry.tokenizer is not None:
        cfg.tokenizer_ckpt = f"{ZOO}{entry.tokenizer}"
    data = DATA.get(entry.name.partition("/")[0], "imagenet")
    choices = [f"data={data}", f"metrics={'inception' if data == 'imagenet' else data}"]
    choices += [f"data.dataset.resolution={entry.resolution}"]
    choices += [f"sampling={entry.sampling}"] if entry.sampling is not None else []
    defaults = _composed(choices)
    for key in ("data", "metrics", "sampling"):
        if cfg.get(key) is None and defaults.get(key) is not None:
            OmegaConf.update(cfg, key, defaults[key], force_add=True)
    if entry.kind == "generator" and data == "imagenet" and cfg.metrics.reference is None:
        file = Path(reference(cfg.paths.data, entry.resolution))
        if file.exists():
            cfg.metrics.reference = str(file)
        else:
            log.info("%s, which published figures are against, does not exist: taking the training images", file)


def reference(data: str, resolution: int) -> str:
    """File of ADM's reference statistics of ImageNet, below the folder of data."""
    return f"{data}/references/{REFERENCES[resolution]}"


def _composed(overrides: list[str]) -> DictConfig:
    if GlobalHydra.instance().is_initialized():
        return compose("eval", overrides)
    with initialize_config_dir(str(CONF), version_base=None):
        return compose("eval", overrides)


def reported(cfg: DictConfig) -> dict[str, Any] | None:
    """What results.json says of a published checkpoint's published figures; None of other checkpoints."""
    if cfg.ckpt is None or not is_published(cfg.ckpt):
        return None
    entry = published_entry(cfg.ckpt)
    return {"name": entry.name, "figures": dict(entry.reported), "protocol": entry.protocol}


def beside(published: dict[str, Any], figures: Iterable[dict[str, Any]]) -> Iterator[str]:
    """Lines that compare figures with the published ones (as `reported` has them), and name those not measured."""
    open_ = dict(published["figures"])
    for figure in figures:
        if (value := open_.pop(figure["name"], None)) is not None:
            yield f"{figure['label']} = {figure['value']:.4f}, published {value:g}"
    if open_:
        yield "published, not measured here: " + ", ".join(f"{name} {value:g}" for name, value in open_.items())
    if published["figures"]:
        yield f"published protocol: {published['protocol']}"
