"""What a command line composes to, without running it."""

from collections.abc import Iterable

from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, open_dict

from tessera.run.strict import CONF, check_config


def composed(script: str, overrides: Iterable[str], fill: str | None = None) -> tuple[DictConfig, dict[str, str]]:
    """The checked configuration of a command, with every interpolation resolved.

    Args:
        script: train, post_train or eval.
        overrides: its arguments.
        fill: given to values that are required and missing; None: these are refused.

    Returns:
        (configuration, choice of each group).

    Raises:
        ConfigError: unknown or missing keys.
        HydraException: what Hydra refuses.
    """
    with initialize_config_dir(str(CONF), version_base=None):
        cfg = compose(script, list(overrides), return_hydra_config=True)
    choices = dict(cfg.hydra.runtime.choices)
    previous = HydraConfig.instance().cfg
    HydraConfig.instance().set_config(cfg)
    try:
        with open_dict(cfg):
            del cfg["hydra"]
        if fill is not None:
            for key in OmegaConf.missing_keys(cfg):
                OmegaConf.update(cfg, key, fill)
        check_config(cfg, script, CONF)
        return OmegaConf.create(OmegaConf.to_container(cfg, resolve=True)), choices
    finally:
        HydraConfig.instance().cfg = previous
