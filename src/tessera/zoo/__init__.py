"""Published checkpoints and exported models."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from tessera.errors import ConfigError
from tessera.zoo import ibq, ibq_generator, maskgit, maskgit_generator, rar, titok, var, var_generator, xqgan
from tessera.zoo.card import ModelCard
from tessera.zoo.export import export, from_pretrained
from tessera.zoo.hub import push_to_hub

__all__ = ["ModelCard", "export", "from_pretrained", "from_public", "push_to_hub"]


def from_public(family: str, config: Mapping[str, Any], state_dict: Mapping[str, Any]) -> nn.Module:
    """Our module with the weights of a published one, loaded strictly.

    Args:
        family: "ibq", "maskgit", "maskgit_vqgan", "rar", "robustok", "titok", "var" or "xqgan".
        config: published hyper-parameters; see the family's module.
        state_dict: published state dict or checkpoint.

    Raises:
        ConfigError: unknown family or unsupported option.
        CheckpointError: weights that do not fit.
    """
    families = {
        "ibq": ibq.from_public,
        "maskgit": maskgit_generator.from_public,
        "maskgit_vqgan": maskgit.from_public,
        "rar": rar.from_public,
        "robustok": xqgan.from_public,  # its tokenizers are XQ-GAN's
        "titok": titok.from_public,
        "var": var.from_public,
        "xqgan": xqgan.from_public,
    }
    # families that also have generators: what tells them by their configs, and what builds them
    generators = {
        "ibq": (lambda: "n_layer" in config, ibq_generator.from_public),
        "robustok": (lambda: rar.is_generator(config), rar.from_public),
        "titok": (lambda: maskgit_generator.is_generator(config), maskgit_generator.from_public),
        "var": (lambda: "depth" in config, var_generator.from_public),
    }
    if family not in families:
        raise ConfigError(f"family {family!r} is unknown; choose one of {', '.join(families)}")
    is_generator, generator_from_public = generators.get(family, (lambda: False, None))
    return (generator_from_public if is_generator() else families[family])(config, state_dict)
