"""Networks made elsewhere: vision transformers of timm, weights from disk, and frozen judges and teachers."""

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


def load_network(network: nn.Module, state: dict[str, Tensor], source: str, ignored: tuple[str, ...] = ()) -> None:
    """Load weights into a frozen network, all of them.

    Args:
        network: what is loaded.
        state: its weights.
        source: "key=path" for the message.
        ignored: prefixes of keys of the file that the network has no use for.

    Raises:
        CheckpointError: names what is missing, unexpected or of another shape.
    """
    state = {name: value for name, value in state.items() if not name.startswith(ignored)} if ignored else state
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


def timm_vit(name: str, pretrained: bool | str, key: str, **options: Any) -> nn.Module:
    """A vision transformer of timm without head; its weights are resampled to the patch size and resolution.

    Args:
        name: timm's name, with the tag of the weights.
        pretrained: True: download timm's weights; a path: read a file of them; False: initialise at random. On the
            meta device nothing is read.
        key: of the configuration, for messages.
        **options: of timm's constructor.

    Raises:
        ConfigError: unknown name, or no vision transformer with class token and learned positions.
        MissingFileError: the weights are neither here nor to be had.
        CheckpointError: the weights don't fit the model.
    """
    import timm
    from timm.models import is_model_in_modules

    architecture = name.split(".")[0]
    if not is_model_in_modules(architecture, {"vision_transformer"}):
        near = ", ".join(timm.list_models("vit_*_dinov2"))
        raise ConfigError(f"{key}.name={name!r} is no vision transformer of timm; choose e.g. one of {near}")
    if isinstance(pretrained, str):
        if not Path(pretrained).is_file():
            raise MissingFileError(
                f"{key}.pretrained={pretrained} does not exist; give the file of {name}'s weights, true to download "
                "them, or false to start from random weights"
            )
        options["pretrained_cfg_overlay"] = {"file": pretrained}
    if not pretrained:
        options["weight_init"] = "jax"  # Xavier: timm's own standard deviation of 0.02 suits large widths only
    load = bool(pretrained) and torch.get_default_device().type != "meta"
    try:
        model = timm.create_model(name, pretrained=load, num_classes=0, **options)
    except (OSError, ConnectionError) as error:
        raise MissingFileError(
            f"{key}.pretrained={pretrained}: the weights of {name} can't be had ({type(error).__name__}: {error}); "
            "give the path of a local file, or false to start from random weights"
        ) from error
    except RuntimeError as error:
        if not load:
            raise
        text = " ".join(str(error).split())
        raise CheckpointError(
            f"{key}.pretrained={pretrained}: the weights don't fit {name} with {key}.width, depth and num_heads as "
            f"configured ({text[:300]}); leave these at null, or set {key}.pretrained=false"
        ) from error
    if model.cls_token is None or model.pos_embed is None:
        raise ConfigError(f"{key}.name={name!r} has no class token or no learned positions; choose a DINOv2")
    return model
