"""Guidance of a tokenizer's codes by frozen image models: contrastive alignment, and independence of branches."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tessera.distributed import all_gather_with_grad
from tessera.errors import ConfigError
from tessera.frozen import Standardise, Unregistered, timm_vit

FEATURES = ("class", "patch")
PROJECTIONS = ("auto", "quant_conv", "own")


def logit_scale(progress: float, start: float, end: float | None = None) -> float:
    """start + progress (end - start): the contrastive loss's inverse temperature, constant where `end` is None."""
    return start if end is None else start + min(max(progress, 0.0), 1.0) * (end - start)


def contrastive_loss(teacher: Tensor, student: Tensor, scale: float, keep: Tensor | None = None) -> Tensor:
    """Symmetric InfoNCE over the joint batch of all processes, float32.

    logits = scale teacher student^T; loss = (CE(logits, i) + CE(logits^T, i)) / 2 with the own image as the class i.

    Args:
        teacher, student: (B, C) features of the same images; equal B on all processes.
        scale: factor of the logits.
        keep: (B,) bool; images that take part, as positives and as negatives. None: all.

    Returns:
        Scalar, the same on all processes; 0 where no image takes part. With the mean that DistributedDataParallel takes
        of gradients, they are those of the joint batch.

    Source: Radford et al. 2021 (arXiv:2103.00020), as open_clip's and XQ-GAN's `ClipLoss`.
    """
    with torch.autocast(teacher.device.type, enabled=False):
        if keep is None:
            keep = torch.ones(len(teacher), dtype=torch.bool, device=teacher.device)
        # one collective for all three
        width = teacher.shape[1]
        joint = all_gather_with_grad(torch.cat([teacher.float(), student.float(), keep[:, None].float()], dim=1))
        taught, learnt, part = joint[:, :width], joint[:, width:-1], joint[:, -1] > 0.5
        logits = scale * taught @ learnt.T
        own = logits.diagonal()
        # a finite floor: -inf would give NaN gradients where nobody takes part
        floor = torch.finfo(logits.dtype).min
        rows = logits.masked_fill(~part[None, :], floor).logsumexp(1)
        columns = logits.masked_fill(~part[:, None], floor).logsumexp(0)
        losses = torch.where(part, 0.5 * (rows + columns) - own, torch.zeros_like(own))
        return losses.sum() / part.sum().clamp_min(1)


def dependency_loss(pooled: Sequence[Tensor], squared: bool = True) -> Tensor:
    """Cosine similarity of the branches' pooled latents, mean over images and pairs of branches.

    Args:
        pooled: one (B, C) per branch, at least two.
        squared: of the cosine, which is least where branches are orthogonal. False: signed, least where they are
            opposite, as in XQ-GAN.

    Returns:
        Scalar float32, in [0, 1] or [-1, 1].
    """
    cosines = torch.stack([F.cosine_similarity(a.float(), b.float()) for a, b in itertools.combinations(pooled, 2)])
    return (cosines.square() if squared else cosines).mean()


class Teacher(nn.Module):
    """Frozen vision transformer that gives one feature per image.

    Args:
        model: timm's name, e.g. vit_base_patch14_dinov2.lvd142m or vit_base_patch16_clip_quickgelu_224.openai.
        resolution: side of the images; the published weights' positions are resampled to it.
        normalisation: of the images, that of the model's training: "imagenet" (DINOv2) or "clip".
        features: "class" token, or "patch": the mean over patch tokens; both after the final norm.
        patch_size: in pixels; the weights' kernel is resampled to it. None: the model's own.
        pretrained: take the published weights, from `weights` or else from the hub; False: random ones, for tests.
        weights: local file of them.
        network: further options of timm's constructor.

    Attributes:
        dim: width of the feature.

    Raises:
        ConfigError: unknown names, or an image that patches don't fill.
        MissingFileError: weights that can't be had.
    """

    def __init__(
        self,
        model: str,
        resolution: int,
        normalisation: str = "imagenet",
        features: str = "class",
        patch_size: int | None = None,
        pretrained: bool = True,
        weights: str | Path | None = None,
        network: dict[str, Any] | None = None,
    ):
        super().__init__()
        if features not in FEATURES:
            raise ConfigError(f"alignment.*.teacher.features={features!r} is unknown; choose one of class, patch")
        self.standardise = Standardise(normalisation, "alignment.*.teacher.normalisation")
        if patch_size is not None and resolution % patch_size:
            raise ConfigError(
                f"alignment.*.teacher.patch_size={patch_size} does not divide data.dataset.resolution={resolution}; "
                "choose a patch size that does (weights are resampled to it)"
            )
        options = {"img_size": resolution, **({} if patch_size is None else {"patch_size": patch_size})}
        self.network = timm_vit(model, pretrained, weights, "alignment.*.teacher", **options, **(network or {}))
        side = self.network.patch_embed.patch_size[0]
        if resolution % side:
            raise ConfigError(
                f"alignment.*.teacher.model={model} has patches of {side} pixels, which do not fill images of "
                f"data.dataset.resolution={resolution}; set alignment.*.teacher.patch_size to a divisor of it"
            )
        self.resolution, self.features, self.dim = resolution, features, self.network.embed_dim

    def forward(self, images: Tensor) -> Tensor:
        """Features (B, dim) of images (B, 3, resolution, resolution) in [-1, 1]."""
        tokens = self.network.forward_features(self.standardise(images))
        return tokens[:, 0] if self.features == "class" else tokens[:, self.network.num_prefix_tokens :].mean(1)


class Alignment(nn.Module):
    """Pulls the pooled quantised latent of chosen branches towards a frozen teacher's feature of the same image.

    The teacher's feature passes the tokenizer's own `quant_conv` where the widths agree (one map for both sides), else
    a linear layer of this module. The teacher itself is no part of parameters, state dict or train mode.

    Args:
        teacher: images -> (B, dim); with `dim` and `resolution`.
        branches: that are aligned, negative ones counted from the last; None: all. Their losses are averaged.
        normalize: compare unit vectors.
        scale: of the logits, at the start of training.
        end_scale: at the end of training, linear in between; None: constant.
        projection: of the teacher's feature: "quant_conv", "own" (a linear layer), or "auto": the first if it fits.

    Raises:
        ConfigError: unknown names, scales that aren't positive.

    Source: XQ-GAN (arXiv:2412.01762), semantic guidance: `branches: [-1]` in all its recipes.
    """

    def __init__(
        self,
        teacher: nn.Module,
        branches: Sequence[int] | None = (-1,),
        normalize: bool = False,
        scale: float = 1.0,
        end_scale: float | None = None,
        projection: str = "auto",
    ):
        super().__init__()
        if projection not in PROJECTIONS:
            raise ConfigError(f"alignment.*.projection={projection!r} is unknown; choose one of {PROJECTIONS}")
        for key, value in (("scale", scale), ("end_scale", 1.0 if end_scale is None else end_scale)):
            if value <= 0:
                raise ConfigError(f"alignment.*.{key}={value} must be positive")
        self._teacher = Unregistered(teacher)
        self.normalize, self.scale, self.end_scale = normalize, scale, end_scale
        self.kind = projection
        self.chosen = None if branches is None else tuple(branches)
        self.branches: tuple[int, ...] = ()
        self.own: nn.Linear | None = None

    def bind(self, tokenizer: nn.Module) -> None:
        """Fit to a tokenizer, once, before optimizers are made.

        Raises:
            ConfigError: a teacher for another image size (patch grid), branches that aren't there, or a width that
                `quant_conv` doesn't take.
        """
        teacher, count = self._teacher.module, tokenizer.quantizer.num_branches
        if teacher.resolution != tokenizer.resolution:
            raise ConfigError(
                f"alignment.*.teacher.resolution={teacher.resolution}: the teacher's patch grid is that of another "
                f"image size than the tokenizer's {tokenizer.resolution}; set it to data.dataset.resolution"
            )
        chosen = range(count) if self.chosen is None else self.chosen
        self.branches = tuple(branch % count for branch in chosen if -count <= branch < count)
        if not self.branches or len(self.branches) < len(chosen) or len(set(self.branches)) < len(self.branches):
            raise ConfigError(
                f"alignment.*.branches={list(chosen)} must name different ones of the {count} branches "
                f"(0 to {count - 1}, or -1 for the last)"
            )
        width, taken = tokenizer.quantizer.dim // count, tokenizer.encoder.out_channels
        if self.kind == "quant_conv" and teacher.dim != taken:
            raise ConfigError(
                f"alignment.*.projection=quant_conv needs a teacher of {taken} channels, the encoder's, but it has "
                f"{teacher.dim}; choose alignment.*.projection=own or another teacher"
            )
        if self.kind == "own" or teacher.dim != taken:
            self.own = nn.Linear(teacher.dim, width)

    def project(self, feature: Tensor, tokenizer: nn.Module) -> list[Tensor]:
        """The teacher's feature (B, dim) in the space of each aligned branch, (B, C) each."""
        if self.own is not None:
            return [self.own(feature)] * len(self.branches)
        projected = tokenizer.quant_conv(feature[:, :, None, None]).flatten(1)
        if tokenizer.encoder.groups > 1:  # the same map for all branches
            return [projected] * len(self.branches)
        parts = projected.chunk(tokenizer.quantizer.num_branches, dim=1)
        return [parts[branch] for branch in self.branches]

    def forward(
        self, images: Tensor, z_q: Tensor, tokenizer: nn.Module, progress: float, keep: Tensor | None = None
    ) -> Tensor:
        """Contrastive loss, mean over the aligned branches.

        Args:
            images: (B, 3, H, W) in [-1, 1].
            z_q: (B, P C, h, w) quantised latent with its straight-through gradient.
            tokenizer: that this is bound to.
            progress: share of training that is over, in [0, 1].
            keep: (B,) bool; images whose latent holds all scales. None: all images.
        """
        with torch.no_grad():
            feature = self._teacher.get(images.device)(images)
        scale = logit_scale(progress, self.scale, self.end_scale)
        parts = z_q.chunk(tokenizer.quantizer.num_branches, dim=1)
        losses = []
        for branch, taught in zip(self.branches, self.project(feature, tokenizer), strict=True):
            pair = taught.float(), parts[branch].float().mean((2, 3))
            if self.normalize:
                pair = tuple(F.normalize(side, dim=1) for side in pair)
            losses.append(contrastive_loss(*pair, scale, keep))
        return torch.stack(losses).mean()
