"""The network behind LPIPS, as a loss (`perceptual.py`) and as a figure (`tessera.metrics.LPIPS`)."""

from importlib.util import find_spec
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tessera.errors import CheckpointError, ConfigError, DataError, MissingFileError
from tessera.frozen import read_weights

BACKBONES = {"alex": "alexnet-owt-7be5be79.pth", "vgg": "vgg16-397923af.pth"}
MIN_SIZE = {"alex": 31, "vgg": 16}  # the pools leave nothing of smaller images
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
# torchvision's VGG16 up to relu5_3: convolutions per stage, a max pool before each stage but the first
CONVS_PER_STAGE = (2, 2, 3, 3, 3)
VGG_CONVS = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)  # torchvision's numbers
# torchvision's AlexNet: number of the convolution -> stride, padding, whether a max pool comes before
ALEX_CONVS = {0: (4, 2, False), 3: (1, 2, True), 6: (1, 1, True), 8: (1, 1, False), 10: (1, 1, False)}
PACKAGES = (("lpips", "weights/v0.1"), ("torchmetrics", "functional/image/lpips_models"))


class Convolutions(nn.Module):
    """Weights of numbered convolutions; widths are those of the weights.

    They are non-persistent buffers: no optimizer, no `requires_grad_` and no state dict of a module around this one can
    reach them.

    Args:
        weights: torchvision's number N of a convolution -> (weight (out, in, k, k), bias (out,)).
    """

    def __init__(self, weights: dict[int, tuple[Tensor, Tensor]]):
        super().__init__()
        for number, parts in weights.items():
            for part, value in zip(("weight", "bias"), parts, strict=True):
                self.register_buffer(f"{part}{number}", value.detach().float().clone(), persistent=False)

    def convolve(self, x: Tensor, number: int, stride: int = 1, padding: int = 1) -> Tensor:
        """Convolution number N and the ReLU after it."""
        weight, bias = getattr(self, f"weight{number}"), getattr(self, f"bias{number}")
        return F.conv2d(x, weight, bias, stride, padding).relu_()

    def widths(self, numbers: list[int]) -> list[int]:
        """Output channels of convolutions."""
        return [len(getattr(self, f"bias{number}")) for number in numbers]


class VGGStages(Convolutions):
    """The five feature stages of VGG16."""

    numbers = VGG_CONVS

    @property
    def channels(self) -> list[int]:
        """Channels of the five features."""
        return self.widths([VGG_CONVS[sum(CONVS_PER_STAGE[: stage + 1]) - 1] for stage in range(len(CONVS_PER_STAGE))])

    def forward(self, x: Tensor) -> list[Tensor]:
        """Features after relu1_2, relu2_2, relu3_3, relu4_3 and relu5_3."""
        features = []
        numbers = iter(VGG_CONVS)
        for stage, convs in enumerate(CONVS_PER_STAGE):
            if stage:
                x = F.max_pool2d(x, 2, 2)
            for number in islice(numbers, convs):
                x = self.convolve(x, number)
            features.append(x)
        return features


class AlexStages(Convolutions):
    """The five convolutions of AlexNet."""

    numbers = tuple(ALEX_CONVS)

    @property
    def channels(self) -> list[int]:
        """Channels of the five features."""
        return self.widths(list(ALEX_CONVS))

    def forward(self, x: Tensor) -> list[Tensor]:
        """Features after each convolution and ReLU."""
        features = []
        for number, (stride, padding, pool) in ALEX_CONVS.items():
            x = F.max_pool2d(x, 3, 2) if pool else x
            x = self.convolve(x, number, stride, padding)
            features.append(x)
        return features


STAGES = {"alex": AlexStages, "vgg": VGGStages}


class LPIPSNetwork(nn.Module):
    """d(x, y) = sum_l mean_hw sum_c w_lc (f_l(x) / |f_l(x)| - f_l(y) / |f_l(y)|)^2 over five stages of a classifier.

    Differentiable, without parameters or state dict; it has no dropout (the public trainings leave the one before the
    linear layers on).

    Args:
        backbone: "alex" or "vgg".
        backbone_weights: torchvision's ImageNet weights, `alexnet-owt-7be5be79.pth` or `vgg16-397923af.pth`. There is
            no LPIPS without them.
        linear_weights: the five linear layers (`lin0.model.1.weight`, ...); None: those in the installed `lpips` or
            `torchmetrics` package.
        key: config key of the network, for messages.
        without: what to choose to do without it, for messages.

    Raises:
        ConfigError: an unknown backbone.
        MissingFileError: weights that aren't there.
        CheckpointError: a file of other content, or linear weights of another backbone.

    Source: Zhang et al. 2018 (arXiv:1801.03924), version 0.1; normalisation with 1e-10 as in the lpips package.
    """

    def __init__(
        self,
        backbone: str,
        backbone_weights: str | Path,
        linear_weights: str | Path | None,
        key: str,
        without: str,
    ):
        super().__init__()
        if backbone not in BACKBONES:
            raise ConfigError(f"{key}.backbone={backbone!r} is unknown; choose one of {', '.join(BACKBONES)}")
        self.backbone, self.without = backbone, without
        file = BACKBONES[backbone]
        advice = f"there is no LPIPS without it: download torchvision's {file} to that path, or choose {without}"
        self.stages = STAGES[backbone](
            _convolutions(
                read_weights(backbone_weights, f"{key}.backbone_weights", advice),
                STAGES[backbone].numbers,
                f"{key}.backbone_weights={backbone_weights}",
                file,
            )
        )
        path = linear_weights or linear_weights_of(backbone, key)
        linear = read_weights(
            path, f"{key}.linear_weights", f"give the linear layers of LPIPS (v0.1/{backbone}.pth), or choose {without}"
        )
        for stage, channels in enumerate(self.stages.channels):
            name = f"lin{stage}.model.1.weight"
            if name not in linear or tuple(linear[name].shape) != (1, channels, 1, 1):
                raise CheckpointError(
                    f"{key}.linear_weights={path} holds no {name} of the {channels} channels that the backbone has; "
                    f"give the linear layers of LPIPS' {backbone} (v0.1/{backbone}.pth)"
                )
            self.register_buffer(f"linear{stage}", linear[name].float(), persistent=False)
        self.register_buffer("shift", torch.tensor(SHIFT).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(SCALE).view(1, 3, 1, 1), persistent=False)
        self.eval()

    def features(self, images: Tensor) -> list[Tensor]:
        """Five stage features of images (B, 3, H, W) in [-1, 1]."""
        return self.stages((images - self.shift) / self.scale)

    def terms(self, x: Tensor, y: Tensor) -> list[Tensor]:
        """The five terms (B,) float32 of the distances of images (B, 3, H, W) in [-1, 1].

        Raises:
            DataError: images of which the pools leave nothing.
        """
        if min(x.shape[-2:]) < MIN_SIZE[self.backbone]:
            raise DataError(
                f"images of {tuple(x.shape[-2:])} pixels are too small for LPIPS[{self.backbone}], which needs "
                f"{MIN_SIZE[self.backbone]}; raise data.dataset.resolution or choose {self.without}"
            )
        return [
            ((_unit(a.float()) - _unit(b.float())).square() * getattr(self, f"linear{stage}")).sum(1).mean((1, 2))
            for stage, (a, b) in enumerate(zip(self.features(x), self.features(y), strict=True))
        ]

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Distances (B,) float32 of images (B, 3, H, W) in [-1, 1]; errors as `terms`."""
        return sum(self.terms(x, y))

    def train(self, mode: bool = True) -> "LPIPSNetwork":
        """Stays in eval mode."""
        return super().train(False)


def _unit(features: Tensor) -> Tensor:
    # the square root of 0 has no gradient: where all channels are 0 the feature stays 0
    squares = features.square().sum(1, keepdim=True)
    norm = torch.where(squares > 0, squares, torch.ones_like(squares)).sqrt() * (squares > 0)
    return features / (norm + 1e-10)


def _convolutions(
    state: dict[str, Tensor], numbers: tuple[int, ...], source: str, file: str
) -> dict[int, tuple[Tensor, Tensor]]:
    """Number of a convolution -> its weight and bias; torchvision numbers them through, and the lpips package groups
    them into slices under the same numbers."""
    stems = {int(key.split(".")[-2]): key.rsplit(".", 1)[0] for key in state if _is_feature(key)}
    if missing := [number for number in numbers if number not in stems]:
        raise CheckpointError(f"{source} lacks features.{missing[0]}.weight; give torchvision's {file}")
    return {number: (state[f"{stems[number]}.weight"], state[f"{stems[number]}.bias"]) for number in numbers}


def _is_feature(key: str) -> bool:
    parts = key.split(".")
    return len(parts) >= 3 and parts[-1] == "weight" and parts[-2].isdigit() and ("features" in parts or "net" in parts)


def linear_weights_of(backbone: str, key: str) -> Path:
    """The file of LPIPS' five linear layers in an installed package.

    Args:
        backbone: "alex" or "vgg".
        key: config key of the network, for the message.

    Raises:
        MissingFileError: no installed package has it.
    """
    for package, inside in PACKAGES:
        spec = find_spec(package)
        for location in (spec.submodule_search_locations if spec is not None else None) or []:
            path = Path(location) / inside / f"{backbone}.pth"
            if path.is_file():
                return path
    raise MissingFileError(f"{key}.linear_weights is not set and no installed package ships them; pip install lpips")
