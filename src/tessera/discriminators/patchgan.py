"""PatchGAN discriminator with batch statistics over all processes."""

import torch
from torch import Tensor, nn

from tessera.distributed import all_reduce_sum_with_grad, is_distributed
from tessera.errors import ConfigError, DataError
from tessera.rng import SampleRng

NORMS = ("batch", "group", "none")


class JointBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm2d whose training statistics are those of the joint batch of all processes, on any device.

    torch's SyncBatchNorm runs on GPUs only; with this one, several CPU processes train as one process does.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not is_distributed():
            return super().forward(x)
        values = x if x.dtype == torch.float64 else x.float()
        count = torch.full((1,), values.numel() / values.shape[1], device=x.device, dtype=values.dtype)
        sums = all_reduce_sum_with_grad(torch.cat([values.sum((0, 2, 3)), count]))
        total = sums[-1]
        centred = values - (sums[:-1] / total).view(1, -1, 1, 1)
        # a second collective instead of E[x^2] - E[x]^2, of which a mean far from 0 leaves no digits in float32
        variance = all_reduce_sum_with_grad(centred.square().sum((0, 2, 3))) / total
        with torch.no_grad():
            self.num_batches_tracked += 1
            unbiased = variance * total / (total - 1).clamp_min(1)
            self.running_mean.lerp_(sums[:-1] / total, self.momentum)
            self.running_var.lerp_(unbiased, self.momentum)
        scale = self.weight * (variance + self.eps).rsqrt()
        return (centred * scale.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)).to(x.dtype)


class PatchGAN(nn.Module):
    """Convolutional classifier of overlapping patches.

    Args:
        in_channels: of the images.
        channels: width of the first layer; doubles up to 8 times that.
        num_layers: stride-2 layers; the receptive field and `min_size` grow with them.
        norm: of all layers but the first and the last: "batch" (statistics of all processes), "group" (32 groups or
            fewer), or "none". Convolutions have a bias where no batch norm removes it.

    Raises:
        ConfigError: a size below 1, an unknown norm, or groups that don't divide the channels.

    Source: Isola et al. 2017 (arXiv:1611.07004); layout, names and initialisation as in taming-transformers, XQ-GAN and
        IBQ, which take the statistics of each process alone.
    """

    def __init__(self, in_channels: int = 3, channels: int = 64, num_layers: int = 3, norm: str = "batch"):
        super().__init__()
        if norm not in NORMS:
            raise ConfigError(f"discriminator.norm={norm!r} is unknown; choose one of {', '.join(NORMS)}")
        for key, value in (("channels", channels), ("num_layers", num_layers)):
            if value < 1:
                raise ConfigError(f"discriminator.{key}={value} must be at least 1")
        self.num_layers = num_layers
        layers: list[nn.Module] = [nn.Conv2d(in_channels, channels, 4, 2, 1), nn.LeakyReLU(0.2)]
        width = channels
        for layer in range(1, num_layers + 1):
            wider, stride = channels * min(2**layer, 8), 2 if layer < num_layers else 1
            layers.append(nn.Conv2d(width, wider, 4, stride, 1, bias=norm != "batch"))
            layers += [_norm(norm, wider), nn.LeakyReLU(0.2)] if norm != "none" else [nn.LeakyReLU(0.2)]
            width = wider
        layers.append(nn.Conv2d(width, 1, 4, 1, 1))
        self.main = nn.Sequential(*layers)
        self.apply(_initialise)

    @property
    def min_size(self) -> int:
        """Smallest image side that leaves at least one logit."""
        # two stride-1 layers of kernel 4 and padding 1 take one pixel each from a side of at least 3
        return 3 * 2**self.num_layers

    def forward(self, images: Tensor, rng: SampleRng | torch.Generator | None = None) -> Tensor:
        """Logits (B, 1, h, w) of images (B, C, H, W) in [-1, 1]; DataError where the images are too small.

        `rng` is not used: nothing here is random.
        """
        if min(images.shape[-2:]) < self.min_size:
            raise DataError(
                f"images of {tuple(images.shape[-2:])} pixels are too small for discriminator.num_layers="
                f"{self.num_layers}, which needs {self.min_size}; lower it or raise data.dataset.resolution"
            )
        return self.main(images)


def _norm(kind: str, channels: int) -> nn.Module:
    if kind == "batch":
        return JointBatchNorm2d(channels)
    groups = min(32, channels)
    if channels % groups:
        raise ConfigError(f"discriminator.norm=group needs widths that {groups} groups divide, not {channels}")
    return nn.GroupNorm(groups, channels)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d | nn.GroupNorm):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)
