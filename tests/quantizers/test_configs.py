"""Every structure of conf/quantizer with every codebook file, as a user would combine them."""

import pytest
import torch
from hydra.errors import InstantiationException

from conf_commands import CONF, composed
from tessera.run.build import make

STRUCTURES = sorted(path.stem for path in (CONF / "quantizer").glob("*.yaml") if "branch:" in path.read_text())
CODEBOOKS = sorted(path.stem for path in (CONF / "quantizer" / "codebook").glob("*.yaml"))
PERTURBATIONS = sorted(path.stem for path in (CONF / "perturbation").glob("*.yaml"))
IMPLIED = {"lfq": 12, "bsq": 12, "fsq": 6}  # channels that the codebook itself decides on


def configured(structure: str, codebook: str, *overrides: str):
    return composed("train", [f"quantizer={structure}", f"quantizer/codebook={codebook}", *overrides]).quantizer


@pytest.fixture(scope="module")
def perturbations():
    """Every choice of conf/perturbation, as training gets it."""
    return [make(composed("train", [f"perturbation={name}"]).perturbation) for name in PERTURBATIONS]


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("codebook", CODEBOOKS)
def test_builds(structure, codebook, perturbations):
    branches = 2
    overrides = [f"quantizer.branches={branches}", *(["quantizer.dim=null"] if codebook in IMPLIED else [])]
    cfg = configured(structure, codebook, *overrides)
    with torch.device("meta"):
        quantizer = make(cfg)
    quantizer.bind_grid((16, 16))
    assert quantizer.num_branches == branches
    assert quantizer.dim == (IMPLIED[codebook] * branches if codebook in IMPLIED else cfg.dim)
    assert quantizer.grids[-1] == (16, 16)
    first, second = (branch.codebooks[0] for branch in quantizer.branches)
    assert first is not second, "branches must not share a codebook by accident"
    for perturbation in perturbations:
        assert perturbation is None or perturbation.check(quantizer) is None  # refuses nothing


@pytest.mark.parametrize("codebook", IMPLIED)
def test_says_what_to_do_where_channels_do_not_fit(codebook):
    cfg = configured("single", codebook)
    with pytest.raises(InstantiationException, match=rf"quantizer\.dim={IMPLIED[codebook]}"):
        make(cfg)


def test_the_lists_are_not_empty():
    assert {"single", "residual", "multiscale"} <= set(STRUCTURES)
    assert set(IMPLIED) | {"vq", "vq_cosine", "vq_ema", "vq_clustering"} <= set(CODEBOOKS)
