"""LPIPS of reconstructions, with the AlexNet or the VGG16 backbone."""

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tessera.losses.lpips_network import BACKBONES, LPIPSNetwork
from tessera.metrics.features import full_precision
from tessera.metrics.reconstruction import ImageMean


class LPIPSDistance(LPIPSNetwork):
    """The distance of LPIPS as it is measured: without gradient, in float32 whatever precision surrounds it.

    Args:
        backbone: "alex" or "vgg".
        backbone_weights: torchvision's ImageNet weights, `alexnet-owt-7be5be79.pth` or `vgg16-397923af.pth`. There is
            no LPIPS without them.
        linear_weights: the five linear layers (`lin0.model.1.weight`, ...); None: those in the installed `lpips` or
            `torchmetrics` package.

    Attributes:
        weights_id: prefix of the SHA-256 of the backbone's file, whose published name ends with it.

    Raises:
        ConfigError: an unknown backbone.
        MissingFileError: weights that aren't there.
        CheckpointError: a file of other content, or linear weights of another backbone.

    Source: Zhang et al. 2018 (arXiv:1801.03924), version 0.1.
    """

    def __init__(self, backbone: str, backbone_weights: str | Path, linear_weights: str | Path | None = None):
        super().__init__(backbone, backbone_weights, linear_weights, key="metrics.lpips", without="metrics/lpips=none")
        with Path(backbone_weights).open("rb") as file:
            self.weights_id = hashlib.file_digest(file, "sha256").hexdigest()[:8]

    @torch.no_grad()
    def terms(self, x: Tensor, y: Tensor) -> list[Tensor]:
        with full_precision(x.device):
            return super().terms(x.float(), y.float())


class LPIPS(ImageMean):
    """Mean over images of the LPIPS distance on 8-bit levels; report it as `LPIPS[<flavour>]`.

    The network is no part of the metric's state, and moves to the images' device.

    Args:
        distance: the network.
        quantisation: see `unit_range`.
    """

    higher_is_better = False

    def __init__(self, distance: LPIPSDistance, quantisation: str = "half-up", **kwargs: Any):
        super().__init__(quantisation, **kwargs)
        self._distance = [distance]  # in a list, where torch doesn't register it

    @property
    def flavour(self) -> str:
        """The backbone, and its weights where they are not the published ones."""
        distance = self._distance[0]
        published = Path(BACKBONES[distance.backbone]).stem.endswith(f"-{distance.weights_id}")
        return distance.backbone if published else f"{distance.backbone}-{distance.weights_id}"

    @property
    def weights_id(self) -> str:
        """Of the backbone, see `LPIPSDistance`."""
        return self._distance[0].weights_id

    def values(self, images: Tensor, reference: Tensor) -> Tensor:
        pair = (2 * self.levels(side).float() - 1 for side in (images, reference))
        return self._distance[0].to(images.device)(*pair).double()
