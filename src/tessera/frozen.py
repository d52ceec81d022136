"""Frozen networks that judge or teach: kept apart from what is trained, and read from disk or the hub."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tessera.errors import CheckpointError, ConfigError, MissingFileError

# (mean, standard deviation) of RGB in [0, 1]
NORMALISATION = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
}


class Unregistered:
    """Holds a frozen module outside of the parameters, state dict and train mode of the module around it.

    `get(device)` moves it where it is needed.
    """

    def __init__(self, module: nn.Module | None):
        if module is not None:
            module.requires_grad_(False).eval()
        self.module = module
        self.device: torch.device | None = None

    def get(self, device: torch.device) -> Any:
        """The module on `device`, in eval mode."""
        if self.module is not None and self.device != device:
            self.module.to(device)
            self.device = device
        return self.module


class Standardise(nn.Module):
    """Images (B, 3, H, W) in [-1, 1] -> ((x + 1) / 2 - mean) / std, float32.

    Args:
        name: whose statistics: "imagenet" or "clip".
        key: config key that an error names.

    Raises:
        ConfigError: another name.
    """

    def __init__(self, name: str, key: str):
        super().__init__()
        if name not in NORMALISATION:
            raise ConfigError(f"{key}={name!r} is unknown; choose one of {', '.join(NORMALISATION)}")
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in NORMALISATION[name])
        self.register_buffer("scale", 0.5 / std, persistent=False)
        self.register_buffer("shift", (0.5 - mean) / std, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Standardised images, float32 or float64."""
        values = images if images.dtype == torch.float64 else images.float()
        return values * self.scale + self.shift


def read_weights(path: str | Path, key: str, advice: str) -> dict[str, Tensor]:
    """State dict of a .safetensors file, or of a pickle that holds nothing but tensors.

    Args:
        path: the file.
        key: config key that gave it, for the messages.
        advice: what to do where the file isn't there.

    Raises:
        MissingFileError: no such file.
        CheckpointError: it can't be read.
    """
    if not Path(path).is_file():
        raise MissingFileError(f"{key}={path} does not exist; {advice}")
    try:
        if Path(path).suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(f"{key}={path} can't be read ({error})") from error


def load_network(network: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Load weights into a frozen network, all of them.

    Args:
        network: what is loaded.
        state: its weights.
        source: "key=path" for the message.

    Raises:
        CheckpointError: names what is missing, unexpected or of another shape.
    """
    own = network.state_dict()
    problems = [f"missing {name}" for name in own if name not in state]
    problems += [f"unexpected {name}" for name in state if name not in own]
    problems += [
        f"{name} is {tuple(value.shape)}, not {tuple(own[name].shape)}"
        for name, value in state.items()
        if name in own and value.shape != own[name].shape
    ]
    if problems:
        raise CheckpointError(f"{source} does not fit: {'; '.join(problems[:5])}; is it of another architecture?")
    network.load_state_dict(state)


def timm_vit(model: str, pretrained: bool, weights: str | Path | None, key: str, **options: Any) -> nn.Module:
    """A timm vision transformer without classifier.

    Args:
        model: timm's name.
        pretrained: take the published weights: from `weights`, or else from the hub. False: random weights, for tests
            and trials. On the meta device nothing is read.
        weights: a local file of them (.safetensors or .pth), resampled to another image or patch size as timm does.
        key: config node that an error names.
        **options: of timm's constructor, e.g. img_size, patch_size, embed_dim, depth, num_heads, act_layer.

    Raises:
        ConfigError: a name that timm doesn't know, or options that it refuses.
        MissingFileError: pretrained weights that are neither on disk nor to be had.
        CheckpointError: weights of another architecture.
    """
    import timm

    pretrained = pretrained and torch.get_default_device().type != "meta"
    if not timm.is_model(model):
        raise ConfigError(f"{key}.model={model!r} is no model of timm; see timm.list_models('vit*')")
    settings = {"num_classes": 0, **options}
    if pretrained and weights is not None and not Path(weights).is_file():
        raise MissingFileError(
            f"{key}.weights={weights} does not exist; download timm's {model} there, set "
            f"{key}.weights=null to take it from the hub, or {key}.pretrained=false"
        )
    overlay = {"file": str(weights)} if weights is not None and pretrained else None
    try:
        return timm.create_model(model, pretrained=pretrained, pretrained_cfg_overlay=overlay, **settings)
    except (OSError, ConnectionError) as error:
        raise MissingFileError(
            f"{key}.model={model}: its weights can't be downloaded ({error}); give a file by {key}.weights=..., or set "
            f"{key}.pretrained=false for random ones"
        ) from error
    except (TypeError, AssertionError) as error:
        raise ConfigError(f"{key}: timm can't build {model} with {settings} ({error})") from error
    except RuntimeError as error:
        raise CheckpointError(f"{key}.weights={weights} does not fit {model} ({error})") from error
