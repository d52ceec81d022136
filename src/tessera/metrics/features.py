"""What every network that turns images into features for a metric has in common.

An extractor states what it is (`name`, `weights_id`, `resize`), always runs in float32 eval mode on
uint8-rounded images, and is owned by the callback that uses it: never by a LightningModule, never in a
checkpoint.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tessera.errors import DataError


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Plain float32 arithmetic: autocast off, TF32 off, settings restored afterwards.

    Half-precision or TF32 inference moves a Frechet distance by far more than training noise does.
    """
    matmul, conv = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    before = matmul.fp32_precision, conv.fp32_precision
    matmul.fp32_precision = conv.fp32_precision = "ieee"
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        matmul.fp32_precision, conv.fp32_precision = before


def check_images(images: Tensor) -> None:
    """Refuse what are no images (B, 3, H, W) of uint8, or of floats in [-1, 1].

    Raises:
        DataError: another shape or dtype.
    """
    if images.ndim != 4 or images.shape[1] != 3:
        raise DataError(f"images to be measured are (B, 3, H, W), not {tuple(images.shape)}")
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise DataError(f"images to be measured are uint8, or floats in [-1, 1], not {images.dtype}")


def as_uint8(images: Tensor) -> Tensor:
    """uint8 images as they are, float images in [-1, 1] rounded as an image file would store them.

    Args:
        images: (B, 3, H, W) uint8, or float in [-1, 1]; clamp what a decoder gives.

    Raises:
        DataError: another shape or dtype, or values out of range or not finite.
    """
    from tessera.data.pixels import TOLERANCE, to_uint8  # here, as tessera.data imports Lightning

    check_images(images)
    return images if images.dtype == torch.uint8 else to_uint8(images, tolerance=TOLERANCE)


class Features(NamedTuple):
    """What one forward pass of an extractor gives.

    Attributes:
        pooled: (B, num_features) float32, one vector per image.
        spatial: (B, num_spatial) float32 for sFID, or None.
        logits: (B, num_classes) float32 for the Inception Score, or None.
    """

    pooled: Tensor
    spatial: Tensor | None = None
    logits: Tensor | None = None


class FeatureExtractor(nn.Module):
    """Base of the extractors: frozen, always in eval mode, without state to save.

    A subclass gives `features`, or `all_features` where it has more than those.

    Attributes:
        name: goes into figure names, as in `rFID[digits-cnn]`; the FID Inception's figures carry none.
        weights_id: prefix of the SHA-256 of the weights.
        num_features: d.
        num_spatial, num_classes: width of the spatial features and of the logits, 0 where it has none.
        input_size: side length the images are resized to.
        resize: how, e.g. `legacy_tf`.
        normalisation: from 0..255 to the network's input range.
        quantisation: how float images become 8-bit levels; "none" where they don't.
        is_image_quality: False where the figures compare models inside this project only.
    """

    name: str
    weights_id: str
    num_features: int
    num_spatial: int = 0
    num_classes: int = 0
    input_size: int
    resize: str
    normalisation: str
    quantisation: str = "half-up"
    is_image_quality: bool = False

    @property
    def identity(self) -> str:
        """What must be equal for statistics to be comparable."""
        return f"{self.name}:{self.weights_id}:{self.resize}"

    @property
    def protocol_fields(self) -> dict[str, str]:
        """What a figure's `Protocol` says of the extractor."""
        return {
            "extractor": self.name,
            "weights_id": self.weights_id,
            "resize": self.resize,
            "quantisation": self.quantisation,
        }

    def features(self, images_u8: Tensor) -> Tensor:
        """(B, 3, H, W) uint8 -> (B, d) float32."""
        return self.all_features(images_u8).pooled

    def all_features(self, images_u8: Tensor) -> Features:
        """(B, 3, H, W) uint8 -> everything that one forward pass gives."""
        return Features(self.features(images_u8))

    def levels(self, images: Tensor) -> Tensor:
        """Images in the form that `features` takes."""
        return as_uint8(images)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) uint8, or float in [-1, 1] -> (B, d) float32."""
        return self.extract(images).pooled

    @torch.no_grad()
    def extract(self, images: Tensor) -> Features:
        """All features of (B, 3, H, W) uint8, or float in [-1, 1], from one forward pass.

        Raises:
            DataError: another shape or dtype, or values out of range.
        """
        with full_precision(images.device):
            return self.all_features(self.levels(images))

    def freeze(self) -> None:
        """To be called at the end of a subclass's constructor."""
        self.eval()
        self.requires_grad_(False)

    def train(self, mode: bool = True) -> "FeatureExtractor":
        """Stays in eval mode: batch statistics would make features depend on the batch."""
        return super().train(False)

    def requires_grad_(self, requires_grad: bool = True) -> "FeatureExtractor":
        """Stays frozen."""
        return super().requires_grad_(False)

    def state_dict(self, *args, destination=None, prefix: str = "", keep_vars: bool = False) -> dict[str, Tensor]:
        """Empty: the weights are a published file and never part of a checkpoint."""
        return {} if destination is None else destination
