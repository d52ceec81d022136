"""From a published family, its hyper-parameters and weights to our module."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from tessera.errors import ConfigError
from tessera.zoo import ibq, ibq_generator, maskgit, maskgit_generator, rar, titok, var_generator, xqgan
from tessera.zoo.registry import published_config

Converter = Callable[[Mapping[str, Any], Mapping[str, Any]], nn.Module]
FAMILIES = ("ibq", "maskgit", "maskgit_vqgan", "rar", "robustok", "titok", "var", "xqgan")


def _converter(family: str, config: Mapping[str, Any], state_dict: Mapping[str, Any]) -> Converter:
    """What builds a family's model; the options tell generators and tokenizers apart."""
    if family == "ibq":
        return (ibq_generator if "n_layer" in config else ibq).from_public
    if family == "maskgit":
        return maskgit_generator.from_public
    if family == "maskgit_vqgan" or (family == "titok" and "num_embeddings" in config):
        return maskgit.from_public
    if family == "titok":
        return (maskgit_generator if maskgit_generator.is_generator(config) else titok).from_public
    if family == "rar" or (family == "robustok" and rar.is_generator(config)):
        return rar.from_public
    if family == "var":
        return var_generator.converter(config, state_dict)
    return xqgan.from_public  # RobusTok's tokenizers are XQ-GAN's


def _tensors(content: Mapping[str, Any]) -> Iterator[Tensor]:
    for value in content.values():
        if isinstance(value, Mapping):
            yield from _tensors(value)
        elif isinstance(value, Tensor):
            yield value


def from_public(family: str, config: Mapping[str, Any] | str, state_dict: Mapping[str, Any]) -> nn.Module:
    """Our module with the weights of a published one, loaded strictly.

    Args:
        family: "ibq", "maskgit", "maskgit_vqgan", "rar", "robustok", "titok", "var" or "xqgan".
        config: published hyper-parameters, see the family's module; or the published name of a checkpoint of the
            family, which may follow "as", for its own.
        state_dict: published state dict or checkpoint. Where it has meta tensors, so has the module.

    Returns:
        A tokenizer or a generator in eval mode.

    Raises:
        ConfigError: unknown family or unsupported option.
        CheckpointError: weights that do not fit.
    """
    if family not in FAMILIES:
        raise ConfigError(f"family {family!r} is unknown; choose one of {', '.join(FAMILIES)}")
    if isinstance(config, str):
        config = published_config(family, config.removeprefix("as "))
    on_meta = any(value.is_meta for value in _tensors(state_dict))
    with torch.device("meta") if on_meta else nullcontext():
        return _converter(family, config, state_dict)(config, state_dict)
