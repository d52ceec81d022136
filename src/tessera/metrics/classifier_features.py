"""Extractors from small classifiers whose weights ship with the package, for offline demonstrations and tests."""

import hashlib
from pathlib import Path

from torch import Tensor

from tessera.errors import CheckpointError, ConfigError, MissingFileError
from tessera.metrics.feature_cnn import FeatureCNN, read_weights
from tessera.metrics.features import FeatureExtractor, Features
from tessera.metrics.resize import resize

WEIGHTS = Path(__file__).parent / "weights"


class _ClassifierFeatures(FeatureExtractor):
    """Penultimate features of a small classifier whose weights ship with the package.

    Attributes:
        file: of the shipped weights.
        shipped_hash: first 8 hex digits of its SHA-256; figures made with other weights carry theirs in the name.
        accuracy: of the shipped classifier on the validation images.
    """

    resize, normalisation = "bilinear-antialias", "x/127.5-1"
    file: str
    shipped_hash: str
    accuracy: float

    def __init__(self, weights_path: str | Path | None = None):
        super().__init__()
        path = Path(weights_path) if weights_path is not None else WEIGHTS / self.file
        if not path.is_file():
            raise MissingFileError(
                f"metrics.features.weights_path={path} does not exist; train it with "
                "`python -m tessera.metrics.train_digits_cnn`"
            )
        self.weights_id = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
        if weights_path is None and self.weights_id != self.shipped_hash:
            raise CheckpointError(
                f"{path} has SHA-256 {self.weights_id}, not {self.shipped_hash} as shipped; reinstall tessera, or give "
                "weights of your own by metrics.features.weights_path"
            )
        if self.weights_id != self.shipped_hash:
            self.name = f"{self.name}-{self.weights_id}"
        architecture, state = read_weights(path)
        self.network = FeatureCNN(**architecture)
        try:
            self.network.load_state_dict(state)
        except RuntimeError as error:
            raise CheckpointError(f"metrics.features.weights_path={path} does not fit: {error}") from error
        self.input_size, self.num_features = self.network.input_size, self.network.num_features
        self.num_classes = self.network.head.out_features
        self.freeze()

    def all_features(self, images_u8: Tensor) -> Features:
        features = self.network.features(prepare(images_u8, self.input_size))
        return Features(features, logits=self.network.head(features))


def prepare(images_u8: Tensor, size: int) -> Tensor:
    """(B, 3, H, W) uint8 -> (B, 3, size, size) float32 in [-1, 1]; bilinear, antialiased, half-pixel."""
    if min(images_u8.shape[-2:]) < 2:
        raise ConfigError(f"images of {tuple(images_u8.shape[-2:])} pixels are too small to compare")
    return resize(images_u8, size, "antialias") / 127.5 - 1


class DigitsFeatures(_ClassifierFeatures):
    """64 features of a classifier of scikit-learn's digits, for offline demonstrations and tests.

    Compares models on digit-like images inside this project; it is no measure of image quality. Colour enters
    through the first layer, though training images are grey.

    Args:
        weights_path: None for the weights in the package.
    """

    name, file, shipped_hash, accuracy = "digits-cnn", "digits_cnn.safetensors", "fc1ab057", 1.0


class FashionFeatures(_ClassifierFeatures):
    """Features of a classifier of Fashion-MNIST at 32x32; otherwise as `DigitsFeatures`."""

    name, file, shipped_hash, accuracy = "fashion-cnn", "fashion_cnn.safetensors", "82cbc82e", 0.9206
