"""Frozen networks that turn images into the features a Frechet distance compares.

An extractor states what it is (`name`, `weights_id`, `resize`), always runs in float32 eval mode on
uint8-rounded images, and is owned by the callback that uses it: never by a LightningModule, never in a
checkpoint.
"""

import hashlib
import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tessera.errors import CheckpointError, ConfigError, DataError, MissingFileError
from tessera.metrics.feature_cnn import FeatureCNN, read_weights

INCEPTION_HASH = "6726825d"
WEIGHTS = Path(__file__).parent / "weights"


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


def as_uint8(images: Tensor) -> Tensor:
    """uint8 images as they are, float images in [-1, 1] rounded as an image file would store them.

    Args:
        images: (B, 3, H, W) uint8, or float in [-1, 1] (clamped; a decoder may overshoot).

    Raises:
        DataError: another shape or dtype.
    """
    from tessera.data.pixels import to_uint8

    if images.ndim != 4 or images.shape[1] != 3:
        raise DataError(f"an extractor takes images (B, 3, H, W), not {tuple(images.shape)}")
    if images.dtype == torch.uint8:
        return images
    if not images.is_floating_point():
        raise DataError(f"an extractor takes uint8 images or floats in [-1, 1], not {images.dtype}")
    return to_uint8(images)


class FeatureExtractor(nn.Module):
    """Base of the extractors: frozen, always in eval mode, without state to save.

    Attributes:
        name: goes into figure names, as in `rFID[digits-cnn]`; the FID Inception's figures carry none.
        weights_id: prefix of the SHA-256 of the weights.
        num_features: d.
        input_size: side length the images are resized to.
        resize: how, e.g. `legacy_tf`.
        normalisation: from 0..255 to the network's input range.
        is_image_quality: False where the figures compare models inside this project only.
    """

    name: str
    weights_id: str
    num_features: int
    input_size: int
    resize: str
    normalisation: str
    is_image_quality: bool = False

    @property
    def identity(self) -> str:
        """What must be equal for statistics to be comparable."""
        return f"{self.name}:{self.weights_id}:{self.resize}"

    def features(self, images_u8: Tensor) -> Tensor:
        """(B, 3, H, W) uint8 -> (B, d) float32."""
        raise NotImplementedError

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) uint8, or float in [-1, 1] -> (B, d) float32."""
        with full_precision(images.device):
            return self.features(as_uint8(images))

    def train(self, mode: bool = True) -> "FeatureExtractor":
        """Stays in eval mode: batch statistics would make features depend on the batch."""
        return super().train(False)

    def requires_grad_(self, requires_grad: bool = True) -> "FeatureExtractor":
        """Stays frozen."""
        return super().requires_grad_(False)

    def state_dict(self, *args, destination=None, prefix: str = "", keep_vars: bool = False) -> dict[str, Tensor]:
        """Empty: the weights are a published file and never part of a checkpoint."""
        return {} if destination is None else destination


class InceptionFeatures(FeatureExtractor):
    """pool_3 features of the 2015-12-05 FID Inception, as torch-fidelity computes them (bit-exact with TF).

    Args:
        weights_path: `weights-inception-2015-12-05-6726825d.pth` (or pytorch-fid's file of the same name).
            None: the file in torch.hub's cache, downloaded from torch-fidelity's release if it isn't there.
        weights_label: name for weights of another origin. Without it only the published file is accepted;
            with it all figures carry the label, e.g. `FID[random-inception-seed0]`.

    Raises:
        MissingFileError: no file, or the download failed.
        CheckpointError: another file than the published one, or weights that do not fit.

    Source: Szegedy et al. 2015 (arXiv:1512.00567); torch-fidelity, feature_extractor_inceptionv3.py.
    """

    input_size, resize, normalisation, num_features = 299, "legacy_tf", "(x-128)/128", 2048

    def __init__(self, weights_path: str | Path | None = None, weights_label: str | None = None):
        super().__init__()
        path = Path(weights_path) if weights_path is not None else _inception_download()
        if not path.is_file():
            raise MissingFileError(
                f"metrics.features.weights_path={path} does not exist; give the path of "
                f"weights-inception-2015-12-05-{INCEPTION_HASH}.pth, or null to download it"
            )
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        if not digest.startswith(INCEPTION_HASH) and weights_label is None:
            raise CheckpointError(
                f"metrics.features.weights_path={path} has SHA-256 {digest[:8]}, not {INCEPTION_HASH}: it is "
                "not FID's 2015-12-05 Inception. Give that file, or name these weights with "
                "metrics.features.weights_label"
            )
        self.name = weights_label or "inception-2015-12-05"
        self.weights_id = digest[:8]
        self.is_image_quality = weights_label is None
        self.network = _inception(path).to(memory_format=torch.channels_last)
        self.eval()
        self.requires_grad_(False)

    def features(self, images_u8: Tensor) -> Tensor:
        return self.network(images_u8)[0]


def _inception_download() -> Path:
    """The published weights in torch.hub's cache, fetched (with hash check) where missing."""
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    path = Path(torch.hub.get_dir()) / "checkpoints" / URL_INCEPTION_V3.rsplit("/", 1)[-1]
    if path.is_file():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(URL_INCEPTION_V3, str(path), hash_prefix=INCEPTION_HASH, progress=False)
    except Exception as error:  # URLError, HTTPError, timeouts, hash mismatch: one remedy for all
        raise MissingFileError(
            f"the FID Inception could not be downloaded ({error}); fetch {URL_INCEPTION_V3} on a machine "
            "with a network and set metrics.features.weights_path to the file, or choose metrics=digits"
        ) from error
    return path


def _inception(path: Path) -> nn.Module:
    """torch-fidelity's network with weights read without executing pickled code."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        buffer = io.BytesIO()
        torch.save(state, buffer)
        buffer.seek(0)
        return FeatureExtractorInceptionV3("tessera", ["2048"], feature_extractor_weights_path=buffer)
    except Exception as error:
        raise CheckpointError(
            f"metrics.features.weights_path={path} does not hold weights of the FID Inception ({error})"
        ) from error


class _ClassifierFeatures(FeatureExtractor):
    """Penultimate features of a small classifier whose weights ship with the package."""

    resize, normalisation = "bilinear-antialias", "x/127.5-1"
    file: str

    def __init__(self, weights_path: str | Path | None = None):
        super().__init__()
        path = Path(weights_path) if weights_path is not None else WEIGHTS / self.file
        if not path.is_file():
            raise MissingFileError(
                f"metrics.features.weights_path={path} does not exist; train it with "
                "`python -m tessera.metrics.train_digits_cnn`"
            )
        self.weights_id = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
        architecture, state = read_weights(path)
        self.network = FeatureCNN(**architecture)
        try:
            self.network.load_state_dict(state)
        except RuntimeError as error:
            raise CheckpointError(f"metrics.features.weights_path={path} does not fit: {error}") from error
        self.input_size, self.num_features = self.network.input_size, self.network.num_features
        self.eval()
        self.requires_grad_(False)

    def features(self, images_u8: Tensor) -> Tensor:
        return self.network.features(prepare(images_u8, self.input_size))


def prepare(images_u8: Tensor, size: int) -> Tensor:
    """(B, 3, H, W) uint8 -> (B, 3, size, size) float32 in [-1, 1]; bilinear, antialiased, half-pixel."""
    if min(images_u8.shape[-2:]) < 2:
        raise ConfigError(f"images of {tuple(images_u8.shape[-2:])} pixels are too small to compare")
    images = images_u8.float()
    if images.shape[-2:] != (size, size):
        images = F.interpolate(images, (size, size), mode="bilinear", align_corners=False, antialias=True)
    return images / 127.5 - 1


class DigitsFeatures(_ClassifierFeatures):
    """64 features of a classifier of scikit-learn's digits, for offline demonstrations and tests.

    Compares models on digit-like images inside this project; it is no measure of image quality. Colour enters
    through the first layer, though training images are grey.

    Args:
        weights_path: None for the weights in the package.
    """

    name, file = "digits-cnn", "digits_cnn.safetensors"


class FashionFeatures(_ClassifierFeatures):
    """Features of a classifier of Fashion-MNIST at 32x32; otherwise as `DigitsFeatures`."""

    name, file = "fashion-cnn", "fashion_cnn.safetensors"
