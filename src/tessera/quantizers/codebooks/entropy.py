"""Entropies of soft assignments to the 2^C codes {-s, s}^C, without a table of samples by codes.

The softmax over codes c of the logits 2 x.c / T factorises over bits: bit d is set with probability
sigma(4 s x_d / T), independently of the others. Hence the entropy of one sample is a sum over bits in closed form.
The entropy of the mean over samples is not; but the mean itself is one matrix product of two half-codebooks.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# Added inside the logarithms, as the published losses do
BIT_EPSILON = 1e-8
CODE_EPSILON = 1e-5


def _mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over the rows that the mask keeps; zero where it keeps none."""
    if mask is None:
        return values.mean(0)
    weights = mask.to(values.dtype)
    return torch.tensordot(weights, values, dims=1) / weights.sum().clamp_min(1)


def _bit_entropy(p: Tensor) -> Tensor:
    q = 1 - p
    return -(p * (p + BIT_EPSILON).log() + q * (q + BIT_EPSILON).log())


def bitwise_entropies(logits: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mean entropy of the samples' bits, and entropy of the mean bits; both summed over bits, in nats.

    H_sample = mean_n sum_d H(p_nd),  H_batch = sum_d H(mean_n p_nd),  p = sigma(logits),
    H(p) = -p log(p + 1e-8) - (1 - p) log(1 - p + 1e-8)

    The second is an upper bound of the entropy of the mean assignment, reached where bits are independent over the
    batch. Costs O(N C), whatever K.

    Args:
        logits: (N, C) float; of each bit being set.
        mask: (N,) bool; rows that are False are left out.

    Returns:
        Two scalars.

    Source: BSQ (arXiv:2406.07548), eq. 12-13; the public XQ-GAN code selects samples with an integer mask, which
        takes one sample for all; here the mask is boolean.
    """
    p = logits.sigmoid()
    return _mean(_bit_entropy(p).sum(1), mask), _bit_entropy(_mean(p, mask)).sum()


def _half(probabilities: Tensor) -> Tensor:
    """(N, c) probabilities of set bits -> (N, 2^c) of their combinations, bit 0 least significant."""
    table = probabilities.new_ones(len(probabilities), 1)
    for p in probabilities.unbind(1):
        p = p[:, None]
        table = torch.cat([table * (1 - p), table * p], dim=1)
    return table


def codewise_entropies(logits: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mean entropy of the samples' assignments to all K = 2^C codes, and entropy of the mean assignment, in nats.

    H_sample = mean_n H(p_n),  H_batch = -sum_k m_k log(m_k + 1e-5),  m = mean_n p_n,  p_n = product over bits

    The sample term is summed over bits in closed form. m is A^T B with A (N, 2^(C/2)) and B the probabilities of the
    upper and lower half of the bits, so that memory is O(N sqrt(K) + K).

    Args:
        logits: (N, C) float; of each bit being set.
        mask: (N,) bool; rows that are False are left out.

    Returns:
        Two scalars.

    Source: LFQ (arXiv:2310.05737), eq. 4; epsilon as in the public XQ-GAN code, which divides by the share of kept
        samples once more.
    """
    # H(p) = softplus(l) - l p, exact also where sigma saturates
    p = logits.sigmoid()
    sample = _mean((F.softplus(logits) - logits * p).sum(1), mask)
    split = logits.shape[1] // 2
    lower, upper = _half(p[:, :split]), _half(p[:, split:])
    if mask is not None:
        weights = mask.to(p.dtype)
        upper = upper * (weights / weights.sum().clamp_min(1))[:, None]
        mean = upper.t() @ lower
    else:
        mean = upper.t() @ lower / len(p)
    return sample, -(mean * (mean + CODE_EPSILON).log()).sum()
