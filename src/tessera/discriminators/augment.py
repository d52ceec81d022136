"""DiffAug: differentiable augmentation of what a discriminator sees, real and generated images alike."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from tessera.errors import ConfigError
from tessera.rng import SampleRng, as_sample_rng

TRANSLATION = 1 / 8  # of the side


def translate(images: Tensor, u_y: Tensor, u_x: Tensor) -> Tensor:
    """Shift each image by whole pixels, zeros moving in.

    out(y, x) = in(y + t_y, x + t_x) with t = floor(u (2 d + 1)) - d and d = round(side / 8).

    Args:
        images: (B, C, H, W).
        u_y, u_x: (B,) uniform in [0, 1).
    """
    count, channels, height, width = images.shape
    reach = [round(side * TRANSLATION) for side in (height, width)]
    # inside the padded image, of which t + d is the first row or column
    first = [(u * (2 * d + 1)).floor().long() for u, d in zip((u_y, u_x), reach, strict=True)]
    rows = first[0][:, None] + torch.arange(height, device=images.device)
    columns = first[1][:, None] + torch.arange(width, device=images.device)
    padded = F.pad(images, (reach[1], reach[1], reach[0], reach[0]))
    sites = rows[:, :, None] * padded.shape[-1] + columns[:, None, :]
    sites = sites.view(count, 1, -1).expand(-1, channels, -1)
    return padded.flatten(2).gather(2, sites).view_as(images)


def recolour(images: Tensor, u_brightness: Tensor, u_saturation: Tensor, u_contrast: Tensor) -> Tensor:
    """Change brightness (+ u - 0.5), saturation (times 2 u) and contrast (times u + 0.5) of each image.

    Args:
        images: (B, C, H, W).
        u_brightness, u_saturation, u_contrast: (B,) uniform in [0, 1).
    """
    u_brightness, u_saturation, u_contrast = (u.view(-1, 1, 1, 1) for u in (u_brightness, u_saturation, u_contrast))
    images = images + (u_brightness - 0.5)
    grey = images.mean(1, keepdim=True)
    images = (images - grey) * (2 * u_saturation) + grey
    level = images.mean((1, 2, 3), keepdim=True)
    return (images - level) * (u_contrast + 0.5) + level


def cut_out(images: Tensor, u_y: Tensor, u_x: Tensor, share: float) -> Tensor:
    """Set a box of `share` of each side to zero; its centre may be anywhere in the image.

    Args:
        images: (B, C, H, W).
        u_y, u_x: (B,) uniform in [0, 1).
        share: of the sides, in [0, 1].
    """
    inside = []
    for u, side in zip((u_y, u_x), images.shape[-2:], strict=True):
        box = round(share * side)
        first = (u * (side + 1 - box % 2)).floor().long() - box // 2
        place = torch.arange(side, device=images.device)
        inside.append((place >= first[:, None]) & (place < first[:, None] + box))
    hole = inside[0][:, None, :, None] & inside[1][:, None, None, :]
    return images.masked_fill(hole, 0.0)


def blur(images: Tensor, strength: float) -> Tensor:
    """Gaussian-like blur 2^-(i / s)^2 with s = strength sqrt(H / 2), edges reflected.

    Args:
        images: (B, C, H, W).
        strength: in [0, 1]; below one pixel's worth nothing happens.
    """
    height, width = images.shape[-2:]
    sigma = math.sqrt(height / 2) * strength
    radius = min(math.floor(3 * sigma), min(height, width) - 1)  # what reflection can give
    if radius < 1:
        return images
    places = torch.arange(-radius, radius + 1, device=images.device, dtype=torch.float32)
    line = torch.exp2(-(places / sigma).square())
    line = (line / line.sum()).to(images.dtype)
    channels = images.shape[1]
    padded = F.pad(images, (radius,) * 4, mode="reflect")
    padded = F.conv2d(padded, line.view(1, 1, -1, 1).expand(channels, 1, -1, 1), groups=channels)
    return F.conv2d(padded, line.view(1, 1, 1, -1).expand(channels, 1, 1, -1), groups=channels)


def blur_fade(steps: float, fade_steps: float) -> float:
    """Strength of the blur `steps` optimizer steps after the discriminator's start: 1 - steps / (fade_steps + 1).

    With fade_steps = 0 the first step alone is blurred.
    """
    strength = 1.0 - min(1.0, max(steps, 0.0) / (fade_steps + 1))
    return strength if strength >= 1e-6 else 0.0


class DiffAug:
    """Translation, colour and cut-out of the images a discriminator sees, with a blur that fades.

    Whether each of the three acts is drawn once per call; how, per image. Nothing is clamped.

    Args:
        probability: of each of the three.
        cutout: share of the sides that is cut out; 0: no cut-out.
        blur_fade: fraction of training, from the discriminator's start, over which the blur fades; None: never blur.

    Raises:
        ConfigError: values outside [0, 1].

    Source: Zhao et al. 2020 (arXiv:2006.10738), in the variant of XQ-GAN, whose blur kernel is reused while its
        radius stays the same; here it follows the strength.
    """

    def __init__(self, probability: float = 1.0, cutout: float = 0.2, blur_fade: float | None = None):
        for key, value in (("probability", probability), ("cutout", cutout), ("blur_fade", blur_fade or 0.0)):
            if not 0 <= value <= 1:
                raise ConfigError(f"discriminator_augment.{key}={value} is outside [0, 1]")
        self.probability, self.cutout, self.blur_fade = probability, cutout, blur_fade

    def strength(self, steps: int, total_steps: int) -> float:
        """Of the blur, `steps` after the discriminator's start in a training of `total_steps`."""
        return 0.0 if self.blur_fade is None else blur_fade(steps, round(self.blur_fade * total_steps))

    def __call__(self, images: Tensor, strength: float = 0.0, rng: SampleRng | torch.Generator | None = None) -> Tensor:
        """Augmented images (B, C, H, W), differentiable; float32 (or float64) whatever the autocast state.

        Args:
            images: (B, C, H, W) float in [-1, 1].
            strength: of the blur, in [0, 1].
            rng: draws: "augment/acts" (3, shared) and "augment/how" (7 per image).
        """
        rng = as_sample_rng(rng, len(images), images.device)
        with torch.autocast(images.device.type, enabled=False):
            images = blur(images if images.dtype == torch.float64 else images.float(), strength)
            moves, recolours, cuts = (rng.shared("augment/acts", 3) < self.probability).tolist()
            if not (moves or recolours or cuts):
                return images
            u = rng.uniform("augment/how", 7).unbind(1)
            if moves:
                images = translate(images, u[0], u[1])
            if recolours:
                images = recolour(images, u[2], u[3], u[4])
            if cuts and self.cutout:
                images = cut_out(images, u[5], u[6], self.cutout)
        return images
