"""TiTok's perceptual loss on the class logits of a ConvNeXt, and the weighted mean of several perceptual losses."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor, nn

from tessera.errors import ConfigError, MissingFileError
from tessera.frozen import Standardise, load_network, read_weights

# (width, next stage's width, blocks) of ConvNeXt-S
SMALL = ((96, 192, 3), (192, 384, 3), (384, 768, 27), (768, None, 3))


class ConvNeXtLogits(nn.Module):
    """Mean squared difference of a ConvNeXt's class logits.

    Both images are scaled to 224 pixels (bilinear, antialiased) and normalised with ImageNet's statistics.

    Args:
        weights: torchvision's `convnext_small-0c510722.pth`; None: downloaded.
        pretrained: False: random weights, for tests; `weights` must then be None.
        stages: (width, next width, blocks) per stage.
        num_classes: logits.

    Raises:
        ConfigError: weights given, but not to be used.
        MissingFileError: weights that can't be had.
        CheckpointError: weights of another architecture.

    Source: TiTok (arXiv:2406.07550), bytedance/1d-tokenizer, modeling/modules/perceptual_loss.py.
    """

    def __init__(
        self,
        weights: str | Path | None = None,
        pretrained: bool = True,
        stages: Sequence[Sequence[int | None]] = SMALL,
        num_classes: int = 1000,
    ):
        super().__init__()
        from torchvision.models.convnext import CNBlockConfig, ConvNeXt

        if weights is not None and not pretrained:
            raise ConfigError("perceptual.weights is given but perceptual.pretrained=false; set one or the other")
        self.network = ConvNeXt([CNBlockConfig(*stage) for stage in stages], num_classes=num_classes)
        if pretrained:
            state = _downloaded() if weights is None else read_weights(weights, "perceptual.weights", ADVICE)
            load_network(self.network, state, f"perceptual.weights={weights}")
        self.standardise = Standardise("imagenet", "perceptual.normalisation")
        self.requires_grad_(False).eval()

    def logits(self, images: Tensor) -> Tensor:
        """Class logits (B, classes) of images (B, 3, H, W) in [-1, 1]."""
        scaled = F.interpolate(images, (224, 224), mode="bilinear", align_corners=False, antialias=True)
        return self.network(self.standardise(scaled))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Distances (B,) float32 of images (B, 3, H, W) in [-1, 1]."""
        return (self.logits(x).float() - self.logits(y).float()).square().mean(1)

    def train(self, mode: bool = True) -> "ConvNeXtLogits":
        """Stays in eval mode: it has stochastic depth."""
        return super().train(False)


ADVICE = (
    "download torchvision's convnext_small-0c510722.pth to that path, set perceptual.weights=null to have it "
    "downloaded, or choose perceptual=none"
)


def _downloaded() -> dict[str, Tensor]:
    from torchvision.models import ConvNeXt_Small_Weights

    try:
        return ConvNeXt_Small_Weights.IMAGENET1K_V1.get_state_dict(progress=False, check_hash=True)
    except OSError as error:
        raise MissingFileError(f"ConvNeXt-S can't be downloaded ({error}); give perceptual.weights=<file>") from error


class PerceptualMean(nn.Module):
    """Weighted mean of perceptual losses, sum_i w_i d_i(x, y) / sum_i w_i.

    Args:
        parts: by name, (x, y) -> (B,) distances.
        weights: by the same names, positive.

    Raises:
        ConfigError: other names, or weights that aren't positive.
    """

    def __init__(self, parts: Mapping[str, nn.Module], weights: Mapping[str, float]):
        super().__init__()
        if set(parts) != set(weights) or not parts or min(weights.values()) <= 0:
            raise ConfigError(
                f"perceptual.weights={dict(weights)} must give a positive weight to each of perceptual.parts: "
                f"{', '.join(parts)}"
            )
        self.parts, self.weights = nn.ModuleDict(parts), dict(weights)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Distances (B,) of images (B, 3, H, W) in [-1, 1]."""
        total = sum(self.weights[name] * part(x, y) for name, part in self.parts.items())
        return total / sum(self.weights.values())
