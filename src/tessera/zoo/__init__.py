"""Published checkpoints by name, and exported models."""

from tessera.zoo.card import ModelCard
from tessera.zoo.export import export, from_pretrained
from tessera.zoo.hub import push_to_hub
from tessera.zoo.loading import load
from tessera.zoo.public import from_public
from tessera.zoo.registry import Checkpoint, info, names

__all__ = [
    "Checkpoint",
    "ModelCard",
    "export",
    "from_pretrained",
    "from_public",
    "info",
    "load",
    "names",
    "push_to_hub",
]
