"""Trains the classifiers whose features `DigitsFeatures` and `FashionFeatures` use.

    python -m tessera.metrics.train_digits_cnn
    python -m tessera.metrics.train_digits_cnn --dataset fashion_mnist --root /path/to/fashion-mnist

Deterministic for given versions and one thread. The validation accuracy is written into the weight file.
"""

import argparse
import gzip
import logging
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tessera.errors import MissingFileError
from tessera.metrics.classifier_features import WEIGHTS, prepare
from tessera.metrics.feature_cnn import FeatureCNN, write_weights

log = logging.getLogger(__name__)

RECIPES = {
    "digits": {"input_size": 16, "widths": [24, 48, 64], "pool": 2, "num_features": 64, "epochs": 40},
    "fashion_mnist": {"input_size": 32, "widths": [32, 64, 96], "pool": 4, "num_features": 64, "epochs": 6},
}


def digits() -> dict[str, tuple[Tensor, Tensor]]:
    """scikit-learn's 8x8 digits; every fifth image is kept for validation."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.from_numpy(np.rint(data.images * 255 / 16).astype(np.uint8))
    labels = torch.from_numpy(data.target).long()
    held_out = torch.arange(len(labels)) % 5 == 4
    return {"train": (images[~held_out], labels[~held_out]), "val": (images[held_out], labels[held_out])}


def fashion_mnist(root: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Fashion-MNIST from its four .gz files in `root`."""
    parts = {}
    for split, stem in (("train", "train"), ("val", "t10k")):
        arrays = []
        for kind, header in (("images-idx3", 16), ("labels-idx1", 8)):
            path = root / f"{stem}-{kind}-ubyte.gz"
            if not path.is_file():
                raise MissingFileError(f"--root: {path} does not exist; give the folder of Fashion-MNIST's .gz files")
            arrays.append(np.frombuffer(gzip.decompress(path.read_bytes()), dtype=np.uint8, offset=header).copy())
        parts[split] = (torch.from_numpy(arrays[0]).view(-1, 28, 28), torch.from_numpy(arrays[1]).long())
    return parts


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shift by up to one pixel in each direction and add faint noise, so that features vary smoothly."""
    size = images.shape[-1]
    padded = F.pad(images, (1, 1, 1, 1), mode="replicate")
    top, left = torch.randint(0, 3, (2,), generator=generator).tolist()
    shifted = padded[..., top : top + size, left : left + size]
    return shifted + 0.1 * torch.randn(images.shape, generator=generator)


def train(
    parts: dict[str, tuple[Tensor, Tensor]], epochs: int, seed: int = 0, **architecture
) -> tuple[FeatureCNN, float]:
    """Fit a `FeatureCNN`.

    Returns:
        The network in eval mode and its validation accuracy in [0, 1].
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    network = FeatureCNN(**architecture, num_classes=10)
    data = {
        split: (prepare(images[:, None].expand(-1, 3, -1, -1), architecture["input_size"]), labels)
        for split, (images, labels) in parts.items()
    }
    images, labels = data["train"]
    batch = 64
    steps = epochs * (len(images) // batch)
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=steps)
    for epoch in range(epochs):
        order = torch.randperm(len(images), generator=generator)
        for rows in order[: len(order) // batch * batch].split(batch):
            logits = network(augment(images[rows], generator))
            loss = F.cross_entropy(logits, labels[rows], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        log.info("epoch %d of %d: loss %.4f", epoch + 1, epochs, loss.item())
    network.eval()
    images, labels = data["val"]
    with torch.no_grad():
        hits = sum(
            int((network(x).argmax(1) == y).sum()) for x, y in zip(images.split(500), labels.split(500), strict=True)
        )
    return network, hits / len(labels)


def main(arguments: list[str] | None = None) -> float:
    """Command line; returns the validation accuracy."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", choices=sorted(RECIPES), default="digits")
    parser.add_argument("--root", type=Path, help="folder of Fashion-MNIST's .gz files")
    parser.add_argument("--output", type=Path, help="weight file; default: the one inside the package")
    parser.add_argument("--epochs", type=int, help="default: the recipe's")
    options = parser.parse_args(arguments)
    if options.dataset == "fashion_mnist" and options.root is None:
        parser.error("--dataset fashion_mnist needs --root")
    torch.set_num_threads(1)
    recipe = dict(RECIPES[options.dataset])
    if options.epochs is not None:
        recipe["epochs"] = options.epochs
    parts = digits() if options.dataset == "digits" else fashion_mnist(options.root)
    network, accuracy = train(parts, **recipe)
    output = options.output or WEIGHTS / f"{options.dataset.split('_')[0]}_cnn.safetensors"
    output.parent.mkdir(parents=True, exist_ok=True)
    write_weights(output, network, {"dataset": options.dataset, "val_accuracy": round(accuracy, 4), **recipe})
    log.info("validation accuracy %.4f, weights in %s", accuracy, output)
    return accuracy


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main()
