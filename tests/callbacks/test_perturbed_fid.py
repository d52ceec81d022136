from functools import partial

import pytest
import torch

from figure_setup import TinyData, TinyFeatures, TinyStage, validate
from forked import run_forked
from quantizer_cases import CODEBOOKS, STRUCTURES
from tessera.callbacks import PerturbedFID, ReconstructionFID
from tessera.callbacks.perturbed_fid import ALPHAS, scaled_deltas, site_draws
from tessera.errors import ConfigError
from tessera.metrics.fid import FrechetDistance
from tessera.quantizers import ProductQuantizer
from tessera.tokenizers import Tokenizer


def run(batch_size=8, **options):
    callback = PerturbedFID(TinyFeatures(), **options)
    validate([callback], TinyStage(), TinyData(batch_size=batch_size))
    return callback.figures[0]


@pytest.mark.parametrize(
    ("codebook_size", "expected"),
    [
        (16384, (200, 280, 360)),
        (8192, (100, 140, 180)),
        (4096, (50, 70, 90)),
        (1024, (10, 15, 20)),
        (32768, (400, 560, 720)),
        (512, (6, 9, 11)),
        (64, (2, 2, 2)),
        (1 << 18, (3200, 4480, 5760)),
        (1 << 40, (8192, 8192, 8192)),
        (1, (1, 1, 1)),
    ],
)
def test_deltas_scale_with_the_codebook(codebook_size, expected):
    assert scaled_deltas(codebook_size) == expected


def test_control_is_rfid_and_mean_is_of_the_table():
    figure = run(deltas=[2, 4, 8])
    rfid = ReconstructionFID(TinyFeatures())
    validate([rfid])
    assert figure.details["control_rfid"] == pytest.approx(rfid.figures[0].value, rel=1e-4)
    table = figure.details["table"]
    assert len(table) == 15 and figure.value == pytest.approx(sum(table.values()) / 15)
    assert figure.label == "pFID[tiny]@N=23,K=16,delta={2,4,8}"
    assert figure.protocol.extra["alpha"] == list(ALPHAS)


def test_equal_deltas_are_one_setting():
    """The published deltas of a codebook of 16 are all 2."""
    figure = run()
    assert set(figure.details["table"]) == {f"a={alpha},d=2" for alpha in ALPHAS}
    assert figure.label == "pFID[tiny]@N=23,K=16,delta={2}"
    assert figure.value == pytest.approx(run(deltas=[2]).value)


def test_one_setting_by_hand():
    alpha, delta = 0.7, 4
    figure = run(alphas=[alpha], deltas=[delta])
    tokenizer, images, extractor = TinyStage().tokenizer, TinyData().val.images, TinyFeatures()
    site, rank = site_draws(0, torch.arange(23), 1, 16)
    with torch.no_grad():
        neighbors = tokenizer.quantizer.neighbors(tokenizer.encode(images), 16)
        tokens = neighbors[..., 0].clone()
        for i in range(23):
            for j in range(16):
                if site[i, 0, j] < alpha:
                    tokens[i, 0, j] = neighbors[i, 0, j, int(rank[i, 0, j] * delta)]
        decoded = tokenizer.detokenize(tokens)
    metric = FrechetDistance(12)
    metric.update(extractor(images), real=True)
    metric.update(extractor(decoded), real=False)
    assert figure.value == pytest.approx(float(metric.compute()), rel=1e-5)


def test_a_codebook_too_small_for_distinct_deltas():
    """K = 16 scales all three deltas to 2: each setting is measured once."""
    assert run().value == pytest.approx(run(deltas=[2]).value, rel=1e-9)


def test_delta_one_is_rfid():
    figure = run(deltas=[1])
    assert figure.value == pytest.approx(figure.details["control_rfid"], rel=1e-12)
    assert set(figure.details["changed_share"].values()) == {0.0}


def test_realised_share_of_changed_tokens():
    figure = run(deltas=[4, 8])
    for alpha in ALPHAS:
        for delta in (4, 8):
            # 23 images x 16 sites
            share = figure.details["changed_share"][f"a={alpha},d={delta}"]
            assert share == pytest.approx(alpha * (1 - 1 / delta), abs=0.08)


def test_batch_size_does_not_matter_but_the_seed_does():
    values = [run(batch_size=size, deltas=[4]).value for size in (3, 23)]
    assert values[0] == pytest.approx(values[1], rel=1e-5)
    other = run(deltas=[4], seed=1)
    assert abs(other.value - values[0]) > 1e-3 * values[0]


def test_draws_belong_to_the_sample():
    whole = site_draws(0, torch.arange(10), 2, 5)
    part = site_draws(0, torch.tensor([7, 3]), 2, 5)
    for a, b in zip(whole, part, strict=True):
        assert torch.equal(a[[7, 3]], b)
    assert not torch.equal(*whole)


def test_chosen_scales_are_hit_alone():
    stage = stage_with()
    values = {}
    for scales in ([0], [2], [0, 1, 2], None):
        callback = PerturbedFID(TinyFeatures(), deltas=[4], scales=scales)
        validate([callback], stage)
        values[str(scales)] = callback.figures[0]
    shares = {name: figure.details["changed_share"]["a=0.8,d=4"] for name, figure in values.items()}
    assert shares["[0]"] == pytest.approx(0.6 / 21, abs=0.02) and shares["[2]"] == pytest.approx(
        0.6 * 16 / 21, abs=0.06
    )
    assert shares["[0, 1, 2]"] == shares["None"] and values["[0, 1, 2]"].value == values["None"].value
    assert len({figure.value for figure in values.values()}) == 3
    assert values["[2]"].label == "pFID[tiny]@N=23,K=17,delta={4},scales={2}"
    assert "scales" not in values["None"].label
    for scales in ([], [3], [-1]):
        with pytest.raises(ConfigError, match=r"callbacks\.pfid\.scales=.*0 to 2"):
            validate([PerturbedFID(TinyFeatures(), deltas=[4], scales=scales)], stage)


def test_other_alphas_are_named():
    figure = run(alphas=[0.5], deltas=[4])
    assert figure.label == "pFID[tiny]@N=23,K=16,alpha={0.5},delta={4}"


def test_branches_are_perturbed_alike():
    callback = PerturbedFID(TinyFeatures(), deltas=[4])
    validate([callback], TinyStage(branches=2))
    assert callback.figures[0].details["changed_share"]["a=0.5,d=4"] == pytest.approx(0.375, abs=0.06)


def stage_with(codebook="vq", structure="multiscale"):
    """The tiny stage with another quantizer, of two branches."""
    case, stage = CODEBOOKS[codebook], TinyStage()
    grids = {"grids": [1, 2, 4]} if "multiscale" in structure else {}
    branch = partial(STRUCTURES[structure], codebook=case.make, **grids)
    tiny = stage.tokenizer
    stage.tokenizer = Tokenizer(tiny.encoder, ProductQuantizer(branch, 2, 2 * case.dim), tiny.decoder, 16)
    return stage


@pytest.mark.parametrize("codebook", CODEBOOKS)
@pytest.mark.parametrize("structure", STRUCTURES)
def test_every_quantizer_can_be_perturbed(codebook, structure):
    """delta = 1 is the control: rFID itself."""
    stage = stage_with(codebook, structure)
    callback = PerturbedFID(TinyFeatures(), deltas=[1, 4], alphas=[0.9])
    validate([callback], stage)
    figure = callback.figures[0]
    assert figure.details["table"]["a=0.9,d=1"] == pytest.approx(figure.details["control_rfid"], rel=1e-12)
    assert figure.details["changed_share"]["a=0.9,d=4"] == pytest.approx(0.9 * 3 / 4, abs=0.06)
    rfid = ReconstructionFID(TinyFeatures())
    validate([rfid], stage)
    assert figure.details["control_rfid"] == pytest.approx(rfid.figures[0].value, rel=1e-3)


@pytest.mark.parametrize(
    "options", [{"alphas": []}, {"alphas": [1.2]}, {"deltas": []}, {"deltas": [0]}, {"deltas": [1.5]}]
)
def test_bad_settings(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        PerturbedFID(TinyFeatures(), **options)


def test_delta_beyond_the_codebook():
    with pytest.raises(ConfigError, match="codebook size 16"):
        run(deltas=[17])


def _ranks(rank, world):
    figure = run(batch_size=4, deltas=[4])
    return figure.value, figure.details["changed_share"]


def test_two_processes_equal_one():
    value, shares = _ranks(0, 1)
    for answer in run_forked(_ranks):
        assert answer[0] == pytest.approx(value, rel=1e-5)
        assert answer[1] == pytest.approx(shares)
