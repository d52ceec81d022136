"""LPIPS with the VGG16 backbone, from weights on disk."""

from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from tessera.errors import CheckpointError, MissingFileError

# torchvision's VGG16 up to relu5_3: convolutions per stage, a max pool before each stage but the first
CONVS_PER_STAGE = (2, 2, 3, 3, 3)
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


class VGGStages(nn.Module):
    """The five feature stages, numbered as torchvision's `features.N`; widths are those of the weights."""

    def __init__(self, weights: dict[int, tuple[Tensor, Tensor]]):
        """Args: weights: convolution number N -> (weight (out, in, 3, 3), bias (out,))."""
        super().__init__()
        self.stages = nn.ModuleList()
        number = 0
        for stage, convs in enumerate(CONVS_PER_STAGE):
            layers: list[nn.Module] = []
            if stage:
                layers.append(nn.MaxPool2d(2, 2))
                number += 1
            for _ in range(convs):
                weight, bias = weights[number]
                conv = nn.Conv2d(weight.shape[1], weight.shape[0], 3, padding=1)
                conv.weight.data.copy_(weight)
                conv.bias.data.copy_(bias)
                layers += [conv, nn.ReLU()]
                number += 2
            self.stages.append(nn.Sequential(*layers))

    def forward(self, x: Tensor) -> list[Tensor]:
        """Features after relu1_2, relu2_2, relu3_3, relu4_3 and relu5_3."""
        features = []
        for stage in self.stages:
            x = stage(x)
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

    d(x, y) = sum_l mean_hw sum_c w_lc (f_l(x) / |f_l(x)| - f_l(y) / |f_l(y)|)^2. Frozen and always in eval mode (the
    public trainings leave the dropout before the linear layers on). Stages keep it out of their checkpoints.

    Args:
        backbone_weights: torchvision's `vgg16-397923af.pth` (keys `features.N.weight`).
        linear_weights: the five linear layers (`lin0.model.1.weight`, ...); None: those in the installed `lpips` or
            `torchmetrics` package.

    Raises:
        MissingFileError: weights that aren't there.
        CheckpointError: a file of other content.

    Source: Zhang et al. 2018 (arXiv:1801.03924), version 0.1; normalisation with 1e-10 as in the lpips package.
    """

    def __init__(self, backbone_weights: str | Path, linear_weights: str | Path | None = None):
        super().__init__()
        backbone = _read(backbone_weights, "perceptual.backbone_weights")
        # torchvision numbers layers through; the lpips package groups them into slices under the same numbers
        found = {int(key.split(".")[-2]): key.rsplit(".", 1)[0] for key in backbone if _is_feature(key)}
        if missing := [number for number in conv_numbers() if number not in found]:
            raise CheckpointError(
                f"perceptual.backbone_weights={backbone_weights} lacks features.{missing[0]}.weight; give torchvision's "
                "vgg16-397923af.pth"
            )
        self.backbone = VGGStages(
            {n: (backbone[f"{found[n]}.weight"], backbone[f"{found[n]}.bias"]) for n in conv_numbers()}
        )
        path = linear_weights or _packaged_linear_weights()
        linear = _read(path, "perceptual.linear_weights")
        keys = [f"lin{stage}.model.1.weight" for stage in range(5)]
        if missing := [key for key in keys if key not in linear]:
            raise CheckpointError(f"perceptual.linear_weights={path} lacks {missing[0]}; give LPIPS' v0.1/vgg.pth")
        for stage, key in enumerate(keys):
            self.register_buffer(f"linear{stage}", linear[key].float())
        self.register_buffer("shift", torch.tensor(SHIFT).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor(SCALE).view(1, 3, 1, 1))
        super().requires_grad_(False)
        self.eval()

    def features(self, images: Tensor) -> list[Tensor]:
        """Five stage features of images (B, 3, H, W) in [-1, 1]."""
        return self.backbone((images - self.shift) / self.scale)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Distances (B,) float32 of images (B, 3, H, W) in [-1, 1]; H, W of at least 16."""
        total = torch.zeros(len(x), device=x.device)
        for stage, (a, b) in enumerate(zip(self.features(x), self.features(y), strict=True)):
            difference = (_unit(a.float()) - _unit(b.float())).square()
            total = total + (difference * getattr(self, f"linear{stage}")).sum(1).mean((1, 2))
        return total

    def train(self, mode: bool = True) -> "LPIPS":
        """Stays in eval mode."""
        return super().train(False)

    def requires_grad_(self, requires_grad: bool = True) -> "LPIPS":
        """Stays frozen."""
        return self


def _unit(features: Tensor) -> Tensor:
    # the square root of 0 has no gradient: where all channels are 0 the feature stays 0
    squares = features.square().sum(1, keepdim=True)
    norm = torch.where(squares > 0, squares, torch.ones_like(squares)).sqrt() * (squares > 0)
    return features / (norm + 1e-10)


def _is_feature(key: str) -> bool:
    parts = key.split(".")
    return len(parts) >= 3 and parts[-1] == "weight" and parts[-2].isdigit() and ("features" in parts or "net" in parts)


def _packaged_linear_weights() -> Path:
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


def _read(path: str | Path, key: str) -> dict[str, Tensor]:
    if not Path(path).is_file():
        raise MissingFileError(
            f"{key}={path} does not exist; download torchvision's vgg16-397923af.pth (or LPIPS' v0.1/vgg.pth for the "
            "linear weights) to that path, or choose perceptual=none"
        )
    try:
        if Path(path).suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(f"{key}={path} can't be read ({error})") from error
