"""What keeps a GAN in balance: the adaptive weight of the adversarial term, and the LeCam regulariser."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tessera.distributed import all_reduce_mean, all_reduce_sum_with_grad, world_size
from tessera.errors import ConfigError


def adaptive_weight(likelihood_grad: Tensor, adversarial_grad: Tensor, max_weight: float = 1e4) -> Tensor:
    """|g_l| / (|g_a| + 1e-4), clamped to [0, max_weight]: both terms then pull equally at the decoder's last layer.

    Args:
        likelihood_grad: gradient of reconstruction + perceptual loss with respect to the last layer.
        adversarial_grad: gradient of the generator's adversarial loss with respect to it.
        max_weight: upper bound.

    Returns:
        Scalar, detached.

    Source: Esser et al. 2021 (arXiv:2012.09841), eq. 7.
    """
    ratio = likelihood_grad.float().norm() / (adversarial_grad.float().norm() + 1e-4)
    return ratio.clamp(0.0, max_weight).detach()


def balanced_gradient(
    reconstruction: Tensor,
    likelihood_grad: Tensor,
    adversarial_grad: Tensor,
    last_layer: nn.Parameter,
    weight: float,
    adaptive: bool = True,
    scale: Tensor | float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Gradient of the image losses at the reconstruction, with the adversarial part balanced.

    The losses are differentiated once, down to the reconstruction. The norms at the last layer come from these
    gradients, so that neither the perceptual network nor the discriminator is run backward twice, as it is when the
    weight is computed by two extra backward passes. Over several processes the gradients are averaged before the norm
    is taken, so that the weight is that of the joint batch.

    Args:
        reconstruction: (B, 3, H, W), the decoder's output with its graph.
        likelihood_grad: gradient of weighted reconstruction + perceptual loss at it.
        adversarial_grad: gradient of the unweighted adversarial loss at it.
        last_layer: weight of the decoder's output projection.
        weight: constant factor of the adversarial term.
        adaptive: multiply it by `adaptive_weight`; else by 1.
        scale: loss scale of a float16 training, in which the backward pass to the last layer would round the
            gradients of mean losses to a few multiples of 6e-8 (the weight came out twice too large).

    Returns:
        likelihood_grad + weight * adaptive * adversarial_grad, and the adaptive weight. Continue the backward pass
        with `reconstruction.backward(gradient)` or by the loss `(reconstruction * gradient).sum()`.
    """
    factor = torch.ones((), device=reconstruction.device)
    if adaptive:
        norms = [
            all_reduce_mean(
                torch.autograd.grad(
                    reconstruction, last_layer, (grad * scale).to(reconstruction.dtype), retain_graph=True
                )[0].float()
                / scale
            )
            for grad in (likelihood_grad, adversarial_grad)
        ]
        factor = adaptive_weight(*norms)
    return likelihood_grad + weight * factor * adversarial_grad, factor


class LeCam(nn.Module):
    """LeCam regulariser: keeps the discriminator's logits near running means of the opposite kind.

    mean relu(real - m_fake)^2 + mean relu(m_real - fake)^2, where the running means m are updated with this step's
    logits first. They are buffers, averaged over processes: saved with checkpoints and equal on all ranks.

    Args:
        decay: of the running means, which start at 0.
        of_means: hold the logits' means near the running ones instead of each logit, relu(mean real - m_fake)^2 + ...,
            as TiTok does.
        update_first: False: the running means are those before this step, as TiTok does.

    Source: Tseng et al. 2021 (arXiv:2104.03310); defaults as in XQ-GAN and IBQ.
    """

    def __init__(self, decay: float = 0.999, of_means: bool = False, update_first: bool = True):
        super().__init__()
        if not 0 <= decay < 1:
            raise ConfigError(f"stage.lecam.decay={decay} is outside [0, 1)")
        self.decay, self.of_means, self.update_first = decay, of_means, update_first
        self.register_buffer("mean_real", torch.zeros(()))
        self.register_buffer("mean_fake", torch.zeros(()))

    def forward(self, real: Tensor, fake: Tensor) -> Tensor:
        """Update the running means with logits of any shape; returns the unweighted scalar."""
        real, fake = real.float(), fake.float()
        means = torch.stack([real.mean(), fake.mean()])
        if self.of_means:
            real, fake = (all_reduce_sum_with_grad(means) / world_size()).unbind()
        old_real, old_fake = self.mean_real, self.mean_fake
        means = all_reduce_mean(means)
        # out of place: the graph of an earlier step may still hold the old buffers
        self.mean_real = torch.lerp(means[0], self.mean_real, self.decay)
        self.mean_fake = torch.lerp(means[1], self.mean_fake, self.decay)
        near_real, near_fake = (self.mean_real, self.mean_fake) if self.update_first else (old_real, old_fake)
        return F.relu(real - near_fake).square().mean() + F.relu(near_real - fake).square().mean()
