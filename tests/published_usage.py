"""XQ-GAN's statistics of used codes, as its training records them; ours are in `tessera.metrics.codebook`."""

import torch
from torch import Tensor


class PublishedUsage:
    """Averages of hits per scale, and the share of codes above one threshold for all scales.

    The published counter rises with every scale of a call, so that only the first scale of the first call is copied;
    the others start as a tenth of their hits, or as a hundredth from the 101st count on.

    Args:
        hits: stored averages, (scales, codes) or (codes,).
    """

    def __init__(self, hits: Tensor):
        self.shape, self.hits, self.count = hits.shape, hits.view(-1, hits.shape[-1]).clone(), 0

    def update(self, tokens: Tensor, grids: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        """Count the tokens (B, L) of one call.

        Returns:
            The averages, and the percentage of used codes per scale.
        """
        codes = self.hits.shape[1]
        for scale, part in enumerate(tokens.split([height * width for height, width in grids], dim=1)):
            found = part.flatten().bincount(minlength=codes).float()
            keep = 0.0 if self.count == 0 else 0.9 if self.count < 100 else 0.99
            self.hits[scale] = keep * self.hits[scale] + (1 - keep) * found
            self.count += 1
        height, width = grids[-1]
        threshold = 0.08 * len(tokens) * height * width / codes
        return self.hits.view(self.shape), 100 * (self.hits >= threshold).float().mean(1)


def assert_usage(actual: Tensor, expected: Tensor, hits: Tensor, tokens: int) -> None:
    """Equal percentages, but for codes whose hits lie on the threshold within rounding."""
    codes = hits.shape[-1]
    on_threshold = ((hits.view(-1, codes) - 0.08 * tokens / codes).abs() < 1e-5).sum(1).max().item()
    torch.testing.assert_close(actual, expected, atol=1e-3 + 100 * on_threshold / codes, rtol=0)
