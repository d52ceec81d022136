"""LPIPS of reconstructions, with the AlexNet or the VGG16 backbone.

The loss of that name, `tessera.losses.LPIPS`, has VGG16 alone.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tessera.errors import CheckpointError, ConfigError, DataError, MissingFileError
from tessera.frozen import read_weights
from tessera.losses.perceptual import SCALE, SHIFT, VGGStages, conv_numbers
from tessera.metrics.features import full_precision
from tessera.metrics.reconstruction import ImageMean, unit_range

BACKBONES = {"alex": "alexnet-owt-7be5be79.pth", "vgg": "vgg16-397923af.pth"}
MIN_SIZE = {"alex": 31, "vgg": 16}
# torchvision's AlexNet: number of the convolution -> stride, padding, whether a max pool comes before
ALEX_CONVS = {0: (4, 2, False), 3: (1, 2, True), 6: (1, 1, True), 8: (1, 1, False), 10: (1, 1, False)}
PACKAGES = (("lpips", "weights/v0.1"), ("torchmetrics", "functional/image/lpips_models"))


class AlexStages(nn.Module):
    """The five convolutions of AlexNet, frozen as non-persistent buffers; like `VGGStages`."""

    def __init__(self, weights: dict[int, tuple[Tensor, Tensor]]):
        """Args: weights: torchvision's number of a convolution -> (weight, bias)."""
        super().__init__()
        for number in ALEX_CONVS:
            for part, value in zip(("weight", "bias"), weights[number], strict=True):
                self.register_buffer(f"{part}{number}", value.detach().float().clone(), persistent=False)

    @property
    def widths(self) -> list[int]:
        """Channels of the five features."""
        return [len(getattr(self, f"bias{number}")) for number in ALEX_CONVS]

    def forward(self, x: Tensor) -> list[Tensor]:
        """Features after each convolution and ReLU."""
        features = []
        for number, (stride, padding, pool) in ALEX_CONVS.items():
            x = F.max_pool2d(x, 3, 2) if pool else x
            weight, bias = getattr(self, f"weight{number}"), getattr(self, f"bias{number}")
            x = F.conv2d(x, weight, bias, stride, padding).relu_()
            features.append(x)
        return features


class LPIPSDistance(nn.Module):
    """d(x, y) = sum_l mean_hw sum_c w_lc (f_l(x) / |f_l(x)| - f_l(y) / |f_l(y)|)^2 over five stages of a classifier.

    It has neither parameters nor a state dict, and runs in float32 whatever precision surrounds it.

    Args:
        backbone: "alex" or "vgg".
        backbone_weights: torchvision's ImageNet weights, `alexnet-owt-7be5be79.pth` or `vgg16-397923af.pth`. There is
            no LPIPS without them.
        linear_weights: the five linear layers (`lin0.model.1.weight`, ...); None: those in the installed `lpips` or
            `torchmetrics` package.

    Raises:
        ConfigError: an unknown backbone.
        MissingFileError: weights that aren't there.
        CheckpointError: a file of other content, or linear weights of another backbone.

    Source: Zhang et al. 2018 (arXiv:1801.03924), version 0.1; normalisation with 1e-10 as in the lpips package.
    """

    def __init__(self, backbone: str, backbone_weights: str | Path, linear_weights: str | Path | None = None):
        super().__init__()
        if backbone not in BACKBONES:
            raise ConfigError(f"metrics.lpips.backbone={backbone!r} is unknown; choose one of {', '.join(BACKBONES)}")
        self.backbone = backbone
        advice = f"LPIPS has no figure without it; download torchvision's {BACKBONES[backbone]} there"
        state = read_weights(backbone_weights, "metrics.lpips.backbone_weights", advice)
        # torchvision numbers layers through; the lpips package groups them into slices under the same numbers
        found = {int(key.split(".")[-2]): key for key in state if key.endswith(".weight") and "classifier" not in key}
        numbers = conv_numbers() if backbone == "vgg" else list(ALEX_CONVS)
        if missing := [number for number in numbers if number not in found]:
            raise CheckpointError(
                f"metrics.lpips.backbone_weights={backbone_weights} lacks features.{missing[0]}.weight; give "
                f"torchvision's {BACKBONES[backbone]}"
            )
        convs = {n: (state[found[n]], state[found[n].removesuffix("weight") + "bias"]) for n in numbers}
        self.stages = VGGStages(convs) if backbone == "vgg" else AlexStages(convs)
        path = linear_weights or linear_weights_of(backbone)
        linear = read_weights(path, "metrics.lpips.linear_weights", "pip install lpips")
        for stage, width in enumerate(self.stages.widths):
            key = f"lin{stage}.model.1.weight"
            if key not in linear or tuple(linear[key].shape) != (1, width, 1, 1):
                raise CheckpointError(
                    f"metrics.lpips.linear_weights={path} holds no {key} of {width} channels; give the linear layers "
                    f"of LPIPS' {backbone} (v0.1/{backbone}.pth)"
                )
            self.register_buffer(f"linear{stage}", linear[key].float(), persistent=False)
        self.register_buffer("shift", torch.tensor(SHIFT).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(SCALE).view(1, 3, 1, 1), persistent=False)

    @torch.no_grad()
    def per_stage(self, x: Tensor, y: Tensor) -> Tensor:
        """(B, 5) float32 terms of the distances of images (B, 3, H, W) in [-1, 1].

        Raises:
            DataError: images of which the pools leave nothing.
        """
        if min(x.shape[-2:]) < MIN_SIZE[self.backbone]:
            raise DataError(
                f"images of {tuple(x.shape[-2:])} pixels are too small for LPIPS[{self.backbone}], which needs "
                f"{MIN_SIZE[self.backbone]}; evaluate larger images or remove LPIPS"
            )
        with full_precision(x.device):
            pairs = zip(*(self.stages((images.float() - self.shift) / self.scale) for images in (x, y)), strict=True)
            terms = [
                ((_unit(a) - _unit(b)).square() * getattr(self, f"linear{stage}")).sum(1).mean((1, 2))
                for stage, (a, b) in enumerate(pairs)
            ]
        return torch.stack(terms, 1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """(B,) float32 distances of images (B, 3, H, W) in [-1, 1]."""
        return self.per_stage(x, y).sum(1)


def _unit(features: Tensor) -> Tensor:
    return features / (features.square().sum(1, keepdim=True).sqrt() + 1e-10)


def linear_weights_of(backbone: str) -> Path:
    """The file of LPIPS' five linear layers in an installed package.

    Raises:
        MissingFileError: no installed package has it.
    """
    for package, inside in PACKAGES:
        spec = find_spec(package)
        for location in (spec.submodule_search_locations if spec is not None else None) or []:
            path = Path(location) / inside / f"{backbone}.pth"
            if path.is_file():
                return path
    raise MissingFileError(
        "metrics.lpips.linear_weights is not set and no installed package ships them; pip install lpips"
    )


class LPIPS(ImageMean):
    """Mean over images of the LPIPS distance on 8-bit levels; report it as `LPIPS[<backbone>]`.

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
        """The backbone."""
        return self._distance[0].backbone

    def values(self, images: Tensor, reference: Tensor) -> Tensor:
        pair = (2 * unit_range(side, self.quantisation).float() - 1 for side in (images, reference))
        return self._distance[0].to(images.device)(*pair).double()
