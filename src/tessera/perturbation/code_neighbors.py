"""Neighbours of codes: looked up in a table while a codebook stays as it is, searched while it trains."""

import torch
from torch import Tensor

from tessera.quantizers.codebooks.base import Codebook
from tessera.quantizers.product import ProductQuantizer

# Entries (int32) of the largest table; beyond it, neighbours are searched every time
_TABLE_ENTRIES = 1 << 26


class _Known:
    """What is known of a codebook in one state: how many codes were searched, and the table once there is one."""

    def __init__(self, codebook: Codebook, device: torch.device):
        # copies, as fused optimizers change parameters without counting it in their versions
        self.device, self.codes = device, [parameter.detach().clone() for parameter in codebook.parameters()]
        self.searched = 0
        self.table: Tensor | None = None

    def is_current(self, codebook: Codebook, device: torch.device) -> bool:
        """Whether the codes are still the same. Implied codes, which have no parameters, always are."""
        pairs = zip(self.codes, codebook.parameters(), strict=True)
        return self.device == device and all(a.device == b.device and torch.equal(a, b) for a, b in pairs)


class CodeNeighbors:
    """The nearest codes of codes, by rank.

    Searching costs one pass over the codebook per code in use, so that a table of all K codes pays off once as many
    were searched in one state of the codebook. In training that changes the codes at every step it never does; of
    frozen codebooks, and of those whose codes are implied (LFQ, BSQ, FSQ), it soon turns the search into a gather. Big
    binary codebooks get no table; their neighbours are enumerated.

    Args:
        delta: neighbours per code in a table; the most that may be asked for.
    """

    def __init__(self, delta: int):
        self.delta = delta
        self._known: dict[Codebook, _Known] = {}

    @torch.no_grad()
    def pick(self, codebook: Codebook, indices: Tensor, rank: Tensor, delta: int) -> Tensor:
        """The code of the given rank among the neighbours of each code.

        Args:
            codebook: of the codes.
            indices: (...) int64 codes.
            rank: (...) int64 in [0, delta); 0 is the code itself (or an equal code of lower index).
            delta: at most that of the table.

        Returns:
            (...) int64.
        """
        known = self._of(codebook, indices.device)
        if known is not None and known.table is not None:
            return known.table[indices, rank].long()
        used, position = indices.unique(return_inverse=True)
        if known is not None:
            known.searched += len(used)
        return codebook.neighbors_of_codes(used, delta)[position, rank]

    def _of(self, codebook: Codebook, device: torch.device) -> _Known | None:
        """What is known of a codebook, with a table where one pays off; None of codebooks that may not have one."""
        size = codebook.codebook_size
        if size * self.delta > _TABLE_ENTRIES:
            return None
        known = self._known.get(codebook)
        if known is None or not known.is_current(codebook, device):
            known = self._known[codebook] = _Known(codebook, device)
        if known.table is None and known.searched >= size:
            known.table = codebook.neighbors_of_codes(torch.arange(size, device=device), self.delta).int()
        return known

    def pick_all(self, quantizer: ProductQuantizer, tokens: Tensor, rank: Tensor, delta: int) -> Tensor:
        """`pick` for the tokens (B, P, L) of a quantizer, each by its own codebook."""
        sizes = [height * width for height, width in quantizer.grids]
        picked = []
        for branch, own, ranks in zip(quantizer.branches, tokens.unbind(1), rank.unbind(1), strict=True):
            pieces = sizes if len(branch.codebooks) > 1 else own.shape[1]
            parts = zip(branch.codebooks, own.split(pieces, 1), ranks.split(pieces, 1), strict=True)
            picked.append(torch.cat([self.pick(*part, delta) for part in parts], dim=1))
        return torch.stack(picked, dim=1)
