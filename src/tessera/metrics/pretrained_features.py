"""Extractors from published classifiers and vision transformers of timm and torchvision.

Figures made with them are named after them, `FID[<name>]`, and are no FID in the literature's sense.
"""

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tessera.errors import CheckpointError, ConfigError, MissingFileError
from tessera.frozen import NORMALISATION, read_weights, timm_vit
from tessera.metrics.features import FeatureExtractor, Features
from tessera.metrics.resize import check_resize, resize

NORMALISATIONS = (*NORMALISATION, "half")


def weights_hash(network: nn.Module) -> str:
    """First 8 hex digits of the SHA-256 over a network's state, names included."""
    digest = hashlib.sha256()
    for key, value in sorted(network.state_dict().items()):
        digest.update(key.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:8]


class _PretrainedFeatures(FeatureExtractor):
    """Resize, standardise, run a frozen network."""

    def __init__(
        self,
        network: nn.Module,
        name: str,
        seed: int | None,
        input_size: int,
        resize: str,
        normalisation: str,
    ):
        super().__init__()
        check_resize(resize)
        if normalisation not in NORMALISATIONS:
            raise ConfigError(
                f"metrics.features.normalisation={normalisation!r} is unknown; choose one of "
                f"{', '.join(NORMALISATIONS)}"
            )
        mean, std = NORMALISATION.get(normalisation, ((0.5,) * 3, (0.5,) * 3))
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)
        self.network = network
        self.weights_id = weights_hash(network) if seed is None else f"random-seed-{seed}"
        self.name = name if seed is None else f"random-{name}-seed{seed}"
        self.is_image_quality = seed is None
        self.input_size, self.resize, self.normalisation = input_size, resize, normalisation
        self.freeze()
        with torch.no_grad():
            sample = self.all_features(torch.zeros(1, 3, input_size, input_size, dtype=torch.uint8))
        self.num_features = sample.pooled.shape[1]
        self.num_classes = 0 if sample.logits is None else sample.logits.shape[1]

    @property
    def identity(self) -> str:
        return f"{super().identity}-{self.input_size}"

    def prepare(self, images_u8: Tensor) -> Tensor:
        """(B, 3, H, W) uint8 -> standardised (B, 3, input_size, input_size) float32."""
        levels = resize(images_u8.contiguous(memory_format=torch.channels_last), self.input_size, self.resize)
        return (levels / 255 - self.mean) / self.std


class TimmFeatures(_PretrainedFeatures):
    """Features of a timm model before its classifier, with the classifier's logits where it has one.

    DINOv2: `vit_large_patch14_dinov2.lvd142m` at 224 pixels gives the normalised class token, as FD-DINOv2 uses it.
    CLIP: `vit_base_patch16_clip_quickgelu_224.openai` gives the class token before the projection.

    Args:
        model: timm's name.
        name: in the figures' names; None: `model`.
        pretrained: the published weights, from `weights` or else from the hub. False: random ones, for tests.
        weights: local file of them (.safetensors or .pth).
        classifier: keep the classifier, whose logits the Inception Score takes.
        input_size, resize, normalisation: of the images ("imagenet", "clip" or "half": mean and deviation 1/2).
        network: further options of timm's constructor.
        seed: of random weights.

    Raises:
        ConfigError: unknown names or options.
        MissingFileError: weights that can't be had.
        CheckpointError: weights of another architecture.

    Source: Stein et al. 2023 (arXiv:2306.04675) for DINOv2 features.
    """

    def __init__(
        self,
        model: str,
        name: str | None = None,
        pretrained: bool = True,
        weights: str | Path | None = None,
        classifier: bool = False,
        input_size: int = 224,
        resize: str = "pil_bicubic",
        normalisation: str = "imagenet",
        network: dict[str, Any] | None = None,
        seed: int = 0,
    ):
        options = dict(network or {})
        if classifier:
            import timm

            if timm.is_model(model):
                options.setdefault("num_classes", timm.get_pretrained_cfg(model).num_classes)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            built = timm_vit(model, pretrained, weights, "metrics.features", **options)
        self.classifier = classifier
        super().__init__(built, name or model, None if pretrained else seed, input_size, resize, normalisation)

    def all_features(self, images_u8: Tensor) -> Features:
        hidden = self.network.forward_features(self.prepare(images_u8))
        pooled = self.network.forward_head(hidden, pre_logits=True).flatten(1)
        return Features(pooled, logits=self.network.forward_head(hidden) if self.classifier else None)


class TorchvisionFeatures(_PretrainedFeatures):
    """Input of the last linear layer of a torchvision classifier, and its logits.

    Args:
        model: torchvision's name, e.g. resnet50.
        name: in the figures' names; None: `torchvision-<model>`.
        pretrained: torchvision's newest weights, from `weights` or else downloaded. False: random ones, for tests.
        weights: local file of them.
        input_size, resize, normalisation: as `TimmFeatures`.
        seed: of random weights.

    Raises:
        ConfigError: an unknown model.
        MissingFileError: weights that can't be had.
        CheckpointError: weights of another architecture.
    """

    def __init__(
        self,
        model: str,
        name: str | None = None,
        pretrained: bool = True,
        weights: str | Path | None = None,
        input_size: int = 224,
        resize: str = "antialias",
        normalisation: str = "imagenet",
        seed: int = 0,
    ):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = _torchvision_network(model, pretrained, weights)
        linear = [layer for layer in network.modules() if isinstance(layer, nn.Linear)]
        if not linear:
            raise ConfigError(
                f"metrics.features.model={model!r} has no linear classifier; choose a torchvision classifier"
            )
        self._hidden: list[Tensor] = []
        linear[-1].register_forward_pre_hook(lambda layer, inputs: self._hidden.append(inputs[0]))
        name = name or f"torchvision-{model}"
        super().__init__(network, name, None if pretrained else seed, input_size, resize, normalisation)

    def all_features(self, images_u8: Tensor) -> Features:
        self._hidden.clear()
        logits = self.network(self.prepare(images_u8))
        return Features(self._hidden.pop().flatten(1), logits=logits)


def _torchvision_network(model: str, pretrained: bool, weights: str | Path | None) -> nn.Module:
    from torchvision import models

    if model not in models.list_models(module=models):
        raise ConfigError(
            f"metrics.features.model={model!r} is no classifier of torchvision; see torchvision.models.list_models()"
        )
    state = None
    if pretrained and weights is not None:
        state = read_weights(weights, "metrics.features.weights", f"download torchvision's {model} there")
    try:
        network = models.get_model(model, weights="DEFAULT" if pretrained and state is None else None)
    except OSError as error:
        raise MissingFileError(
            f"metrics.features.model={model}: its weights can't be downloaded ({error}); give a file by "
            "metrics.features.weights=..."
        ) from error
    if state is not None:
        try:
            network.load_state_dict(state)
        except RuntimeError as error:
            raise CheckpointError(f"metrics.features.weights={weights} does not fit {model} ({error})") from error
    return network
