"""The small classifier behind `DigitsFeatures` and `FashionFeatures`, and its weight files."""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from tessera.errors import CheckpointError


class FeatureCNN(nn.Module):
    """Three 3x3 convolutions (two of stride 2), pooling to a small grid, a feature layer and a classifier.

    The feature layer ends in SiLU, not ReLU: a unit that is 0 for every image would make covariances
    singular.

    Args:
        input_size: side length of the images.
        widths: channels of the convolutions.
        pool: side length of the grid that the feature layer sees.
        num_features: width of the feature layer.
        num_classes: number of classes.
    """

    def __init__(self, input_size: int, widths: list[int], pool: int, num_features: int, num_classes: int):
        super().__init__()
        self.architecture = {
            "input_size": input_size,
            "widths": list(widths),
            "pool": pool,
            "num_features": num_features,
            "num_classes": num_classes,
        }
        self.input_size, self.num_features = input_size, num_features
        layers: list[nn.Module] = []
        channels = 3
        for depth, width in enumerate(widths):
            layers += [
                nn.Conv2d(channels, width, 3, stride=1 if depth == 0 else 2, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.SiLU(),
            ]
            channels = width
        self.body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(pool), nn.Flatten())
        self.feature = nn.Sequential(nn.Linear(channels * pool * pool, num_features), nn.SiLU())
        self.head = nn.Linear(num_features, num_classes)

    def features(self, images: Tensor) -> Tensor:
        """(B, 3, input_size, input_size) float in [-1, 1] -> (B, num_features)."""
        return self.feature(self.body(images))

    def forward(self, images: Tensor) -> Tensor:
        """Images as in `features` -> (B, num_classes) logits."""
        return self.head(self.features(images))


def write_weights(path: Path, network: FeatureCNN, notes: dict[str, Any]) -> None:
    """Save weights with the architecture and notes (accuracy, data) in the file's header."""
    metadata = {"architecture": json.dumps(network.architecture), "notes": json.dumps(notes)}
    save_file({key: value.contiguous() for key, value in network.state_dict().items()}, path, metadata=metadata)


def read_weights(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Architecture and state dict written by `write_weights`.

    Raises:
        CheckpointError: not such a file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            architecture = json.loads((file.metadata() or {})["architecture"])
            return architecture, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, KeyError) as error:
        raise CheckpointError(f"{path} is not a weight file of FeatureCNN ({error})") from error
