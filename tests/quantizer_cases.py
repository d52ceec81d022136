"""Every codebook and every structure, small: what the product tests go through.

A new codebook is one line in CODEBOOKS.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from tessera.quantizers import (
    BSQCodebook,
    ClusteringRevival,
    Codebook,
    FSQCodebook,
    LFQCodebook,
    MultiScaleQuantizer,
    ProductQuantizer,
    RandomRevival,
    ResidualQuantizer,
    SingleGridQuantizer,
    Structure,
    VQCodebook,
)

GRID = (3, 5)
GRIDS = [1, (2, 2), (2, 4), GRID]


class CodebookCase(NamedTuple):
    """Factory called with `dim`, the channels it works on, and whether training changes it other than by gradient."""

    make: Callable[..., Codebook]
    dim: int
    updates: bool = False


CODEBOOKS: dict[str, CodebookCase] = {
    "vq": CodebookCase(partial(VQCodebook, codebook_size=17, l2_normalize=False), 4),
    "vq_l2": CodebookCase(partial(VQCodebook, codebook_size=17, l2_normalize=True), 4),
    "vq_cosine": CodebookCase(partial(VQCodebook, codebook_size=17, l2_normalize=False, search="cosine"), 4),
    "vq_ema": CodebookCase(partial(VQCodebook, codebook_size=17, l2_normalize=False, update="ema"), 4, True),
    "vq_ema_l2_revival": CodebookCase(
        partial(VQCodebook, codebook_size=17, update="ema", ema_decay=0.9, revival=partial(RandomRevival, decay=0.5)),
        4,
        True,
    ),
    "vq_clustering": CodebookCase(
        partial(VQCodebook, codebook_size=17, l2_normalize=False, revival=ClusteringRevival), 4, True
    ),
    "lfq": CodebookCase(partial(LFQCodebook, bits=4), 4),
    "lfq_hard": CodebookCase(partial(LFQCodebook, bits=4, entropy="hard", temperature=1.0), 4),
    "bsq": CodebookCase(partial(BSQCodebook, bits=5), 5),
    "bsq_none": CodebookCase(partial(BSQCodebook, bits=5, entropy="none"), 5),
    "fsq": CodebookCase(partial(FSQCodebook, levels=[4, 3, 2, 5]), 4),
}

STRUCTURES: dict[str, Callable[..., Structure]] = {
    "single": SingleGridQuantizer,
    "residual": partial(ResidualQuantizer, depth=3),
    "multiscale": partial(MultiScaleQuantizer, grids=GRIDS),
    "multiscale_own": partial(
        MultiScaleQuantizer, grids=GRIDS, shared_codebook=False, phi_convs=0, gain=0.9, penalties_at="scale"
    ),
}


def build(codebook: str, structure: str, branches: int, **options) -> ProductQuantizer:
    """The quantizer of a combination, on GRID; `options` go to the ProductQuantizer."""
    case = CODEBOOKS[codebook]
    branch = partial(STRUCTURES[structure], codebook=case.make)
    quantizer = ProductQuantizer(branch, branches=branches, dim=case.dim * branches, **options)
    quantizer.bind_grid(GRID)
    return quantizer


COMBINATIONS = [(c, s, p) for c in CODEBOOKS for s in STRUCTURES for p in (1, 2)]
