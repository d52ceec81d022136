"""LPIPS with the VGG16 backbone, from weights on disk."""

from importlib.util import find_spec
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tessera.errors import CheckpointError, DataError, MissingFileError
from tessera.frozen import read_weights

# torchvision's VGG16 up to relu5_3: convolutions per stage, a max pool before each stage but the first
CONVS_PER_STAGE = (2, 2, 3, 3, 3)
MIN_SIZE = 16
ADVICE = (
    "download torchvision's vgg16-397923af.pth (or LPIPS' v0.1/vgg.pth for the linear weights) to that path, or choose "
    "perceptual=none"
)
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


class VGGStages(nn.Module):
    """The five feature stages of VGG16; widths are those of the weights.

    The weights are non-persistent buffers: no optimizer, no `requires_grad_` and no state dict of a module around this
    one can reach them.
    """

    def __init__(self, weights: dict[int, tuple[Tensor, Tensor]]):
        """Args: weights: torchvision's number N of a convolution -> (weight (out, in, 3, 3), bias (out,))."""
        super().__init__()
        self.numbers = conv_numbers()
        for number in self.numbers:
            for part, value in zip(("weight", "bias"), weights[number], strict=True):
                self.register_buffer(f"{part}{number}", value.detach().float().clone(), persistent=False)

    @property
    def widths(self) -> list[int]:
        """Channels of the five features."""
        lasts = [sum(CONVS_PER_STAGE[: stage + 1]) - 1 for stage in range(len(CONVS_PER_STAGE))]
        return [len(getattr(self, f"bias{self.numbers[last]}")) for last in lasts]

    def forward(self, x: Tensor) -> list[Tensor]:
        """Features after relu1_2, relu2_2, relu3_3, relu4_3 and relu5_3."""
        features = []
        numbers = iter(self.numbers)
        for stage, convs in enumerate(CONVS_PER_STAGE):
            if stage:
                x = F.max_pool2d(x, 2, 2)
            for number in islice(numbers, convs):
                x = F.conv2d(x, getattr(self, f"weight{number}"), getattr(self, f"bias{number}"), padding=1).relu_()
            features.append(x)
        return features


def conv_numbers() -> list[int]:
    """torchvision's numbers of the 13 convolutions: 0, 2, 5, 7, 10, ..., 28."""
    numbers, number = [], 0
    for stage, convs in enumerate(CONVS_PER_STAGE):
        number += 1 if stage else 0
        for _ in range(convs):
            numbers.append(number)
            number += 2
    return numbers


class LPIPS(nn.Module):
    """Learned perceptual distance: sum over five VGG16 stages of linearly weighted squared feature differences.

    d(x, y) = sum_l mean_hw sum_c w_lc (f_l(x) / |f_l(x)| - f_l(y) / |f_l(y)|)^2. It has neither parameters nor a state
    dict, so it stays frozen and out of checkpoints wherever it is held; and no dropout (the public trainings leave the
    one before the linear layers on).

    Args:
        backbone_weights: torchvision's `vgg16-397923af.pth` (keys `features.N.weight`).
        linear_weights: the five linear layers (`lin0.model.1.weight`, ...); None: those in the installed `lpips` or
            `torchmetrics` package.

    Raises:
        MissingFileError: weights that aren't there.
        CheckpointError: a file of other content, or linear weights of another backbone.

    Source: Zhang et al. 2018 (arXiv:1801.03924), version 0.1; normalisation with 1e-10 as in the lpips package.
    """

    def __init__(self, backbone_weights: str | Path, linear_weights: str | Path | None = None):
        super().__init__()
        backbone = read_weights(backbone_weights, "perceptual.backbone_weights", ADVICE)
        # torchvision numbers layers through; the lpips package groups them into slices under the same numbers
        found = {int(key.split(".")[-2]): key.rsplit(".", 1)[0] for key in backbone if _is_feature(key)}
        if missing := [number for number in conv_numbers() if number not in found]:
            raise CheckpointError(
                f"perceptual.backbone_weights={backbone_weights} lacks features.{missing[0]}.weight; "
                "give torchvision's vgg16-397923af.pth"
            )
        self.backbone = VGGStages(
            {n: (backbone[f"{found[n]}.weight"], backbone[f"{found[n]}.bias"]) for n in conv_numbers()}
        )
        path = linear_weights or packaged_linear_weights()
        linear = read_weights(path, "perceptual.linear_weights", ADVICE)
        for stage, width in enumerate(self.backbone.widths):
            key, expected = f"lin{stage}.model.1.weight", (1, width, 1, 1)
            if key not in linear:
                raise CheckpointError(f"perceptual.linear_weights={path} lacks {key}; give LPIPS' v0.1/vgg.pth")
            if tuple(linear[key].shape) != expected:
                raise CheckpointError(
                    f"perceptual.linear_weights={path} holds {key} of shape {tuple(linear[key].shape)}, but the "
                    f"backbone needs {expected}; give the linear layers of LPIPS' VGG16 (v0.1/vgg.pth)"
                )
            self.register_buffer(f"linear{stage}", linear[key].float(), persistent=False)
        self.register_buffer("shift", torch.tensor(SHIFT).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(SCALE).view(1, 3, 1, 1), persistent=False)
        self.eval()

    def features(self, images: Tensor) -> list[Tensor]:
        """Five stage features of images (B, 3, H, W) in [-1, 1]."""
        return self.backbone((images - self.shift) / self.scale)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Distances (B,) float32 of images (B, 3, H, W) in [-1, 1].

        Raises:
            DataError: H or W below 16, of which four poolings leave nothing.
        """
        if min(x.shape[-2:]) < MIN_SIZE:
            raise DataError(
                f"images of {tuple(x.shape[-2:])} pixels are too small for LPIPS, which needs {MIN_SIZE}; raise "
                "data.dataset.resolution or choose perceptual=none"
            )
        total = torch.zeros(len(x), device=x.device)
        for stage, (a, b) in enumerate(zip(self.features(x), self.features(y), strict=True)):
            difference = (_unit(a.float()) - _unit(b.float())).square()
            total = total + (difference * getattr(self, f"linear{stage}")).sum(1).mean((1, 2))
        return total

    def train(self, mode: bool = True) -> "LPIPS":
        """Stays in eval mode."""
        return super().train(False)


def _unit(features: Tensor) -> Tensor:
    # the square root of 0 has no gradient: where all channels are 0 the feature stays 0
    squares = features.square().sum(1, keepdim=True)
    norm = torch.where(squares > 0, squares, torch.ones_like(squares)).sqrt() * (squares > 0)
    return features / (norm + 1e-10)


def _is_feature(key: str) -> bool:
    parts = key.split(".")
    return len(parts) >= 3 and parts[-1] == "weight" and parts[-2].isdigit() and ("features" in parts or "net" in parts)


def packaged_linear_weights() -> Path:
    """The file of LPIPS' five linear layers for VGG16 in an installed package.

    Raises:
        MissingFileError: no installed package has it.
    """
    for package, inside in (
        ("lpips", "weights/v0.1/vgg.pth"),
        ("torchmetrics", "functional/image/lpips_models/vgg.pth"),
    ):
        spec = find_spec(package)
        if spec is not None and spec.submodule_search_locations:
            path = Path(spec.submodule_search_locations[0]) / inside
            if path.is_file():
                return path
    raise MissingFileError(
        "perceptual.linear_weights is not set and no installed package ships them; pip install lpips"
    )
