"""Loss and accuracy of a generator by branch, scale and part of the image, from the sums it reports per token site."""

import itertools

import torch
from torch import Tensor

from tessera import distributed
from tessera.quantizers.product import ProductQuantizer

QUARTERS = 4


class TokenScores:
    """Sums a generator's scores over batches, on their device, until the means are asked for.

    Groups of token sites are the branches (where there are several), and the scales or, of a single grid, the quarters
    of its raster order.

    Args:
        quantizer: whose tokens they are.
    """

    def __init__(self, quantizer: ProductQuantizer):
        length, branches = quantizer.num_tokens, quantizer.num_branches
        sizes, kind = [height * width for height, width in quantizer.grids], "scale"
        if len(sizes) == 1:
            bounds, kind = [part * length // QUARTERS for part in range(QUARTERS + 1)], "quarter"
            sizes = [end - start for start, end in itertools.pairwise(bounds)]
        with torch.device("cpu"):
            place = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes)).expand(branches, -1)
            branch = torch.arange(branches)[:, None].expand(-1, length)
        groups = {f"branch{number}": branch == number for number in range(branches)} if branches > 1 else {}
        groups |= {f"{kind}{number}": place == number for number, size in enumerate(sizes) if size}
        self.names = list(groups)
        self.members = torch.stack([*groups.values(), place >= 0]).flatten(1).double()  # (groups and all, P L)
        self.sums = torch.zeros(3, branches, length, device="cpu")

    def add(self, scores: dict[str, Tensor]) -> None:
        """Count a batch; `scores` is what `Generator.loss` returned."""
        new = torch.stack([scores["site_loss"], scores["site_hits"], scores["site_count"]])
        self.sums = self.sums.to(new.device) + new

    def means(self, over_processes: bool = False) -> dict[str, float]:
        """Means of all that was added since the last call; reads them back to the host.

        Args:
            over_processes: of all processes' batches; every process must call it.

        Returns:
            "accuracy" of all tokens, "loss/<group>" and "accuracy/<group>"; what counted no token is left out.
        """
        sums = distributed.all_reduce_sum(self.sums) if over_processes else self.sums
        self.sums = torch.zeros_like(self.sums)
        *rows, (_, hits, count) = (self.members @ sums.cpu().flatten(1).double().T).tolist()
        means = {"accuracy": hits / count} if count else {}
        for name, (loss, hits, count) in zip(self.names, rows, strict=True):
            if count:
                means |= {f"loss/{name}": loss / count, f"accuracy/{name}": hits / count}
        return means
