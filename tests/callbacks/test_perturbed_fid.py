from functools import partial

import pytest
import torch

from figure_setup import TinyData, TinyFeatures, TinyStage, validate
from forked import run_forked
from quantizer_cases import CODEBOOKS, STRUCTURES
from tessera.callbacks import PerturbedFID, ReconstructionFID
from tessera.errors import ConfigError
from tessera.metrics.fid import FrechetDistance
from tessera.metrics.perturbed_fid import table_text
from tessera.perturbation.grid import ALPHAS, PerturbationGrid, scaled_deltas, site_draws
from tessera.quantizers import GaussianBottleneck, ProductQuantizer
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
    other = run(deltas=[4], seeds=[1])
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


def test_several_seeds_give_mean_and_spread():
    cells = {"alphas": [0.9, 0.5], "deltas": [2, 4]}
    apart = {seed: run(**cells, seeds=[seed]) for seed in (0, 5, 7)}
    figure = run(**cells, seeds=[0, 5, 7])
    values = {seed: one.value for seed, one in apart.items()}
    assert figure.details["per_seed"] == pytest.approx(values)
    assert figure.value == pytest.approx(sum(values.values()) / 3)
    assert figure.details["spread"] == pytest.approx((max(values.values()) - min(values.values())) / 2)
    for name in ("table", "changed_share"):
        for cell, value in figure.details[name].items():
            assert value == pytest.approx(sum(one.details[name][cell] for one in apart.values()) / 3)
    assert figure.label == "pFID[tiny]@N=23,K=16,alpha={0.9,0.5},delta={2,4},seeds={0,5,7}"
    assert {one.label for one in apart.values()} == {
        "pFID[tiny]@N=23,K=16,alpha={0.9,0.5},delta={2,4}",
        "pFID[tiny]@N=23,K=16,alpha={0.9,0.5},delta={2,4},seeds={5}",
        "pFID[tiny]@N=23,K=16,alpha={0.9,0.5},delta={2,4},seeds={7}",
    }
    assert "per_seed" not in apart[5].details


def test_neighbours_of_codes():
    """Other neighbours than those of latents, named in the label; the control is the same."""
    figures = {of: run(deltas=[4], neighbors_of=of) for of in ("latent", "code")}
    assert figures["code"].label == "pFID[tiny]@N=23,K=16,delta={4},neighbors_of=code"
    assert abs(figures["code"].value - figures["latent"].value) > 1e-3 * figures["latent"].value
    assert figures["code"].details["control_rfid"] == figures["latent"].details["control_rfid"]
    tokenizer, images = TinyStage().tokenizer, TinyData().val.images
    grid = PerturbationGrid([0.7], [4], neighbors_of="code")
    with torch.no_grad():
        z = tokenizer.encode(images)
        _, found = grid.tokens(tokenizer.quantizer, z, torch.arange(23))
        neighbors = tokenizer.quantizer.neighbors(tokenizer.quantizer.encode(z), 4)
    site, rank = site_draws(0, torch.arange(23), 1, 16)
    expected = torch.where(site < 0.7, neighbors.gather(-1, (rank * 4).long()[..., None])[..., 0], neighbors[..., 0])
    assert torch.equal(found.tokens, expected)


def test_a_small_sample_is_always_the_same_and_named():
    figures = [run(batch_size=size, deltas=[4], num_samples=11) for size in (3, 23)]
    assert figures[0].value == pytest.approx(figures[1].value, rel=1e-5)
    assert figures[0].label == "pFID[tiny]@N=11,K=16,delta={4}" and figures[0].protocol.samples == 11
    assert "samples do not determine a covariance" in figures[0].warnings[0]
    with pytest.raises(ConfigError, match=r"num_samples=24 must be between 2 and the 23 images"):
        run(num_samples=24)


def test_table_for_the_console():
    figure = run(deltas=[2, 4], seeds=[0, 1])
    lines = table_text(figure).splitlines()
    assert lines[0].split() == ["alpha", "d=2", "d=4", "tokens", "changed"]
    assert len(lines) == 7
    for line, alpha in zip(lines[1:], ALPHAS, strict=False):
        assert line.split()[:3] == [
            f"{alpha:g}",
            *(f"{figure.details['table'][f'a={alpha},d={d}']:.4f}" for d in (2, 4)),
        ]
    assert lines[-1].startswith(f"mean {figure.value:.4f} +- ") and "2 seeds" in lines[-1]
    assert lines[-1].endswith(f"(rFID) {figure.details['control_rfid']:.4f}")


def test_chosen_branches_are_hit_alone():
    figures = {}
    for branches in ([0], [1], None):
        callback = PerturbedFID(TinyFeatures(), deltas=[4], alphas=[0.8], branches=branches)
        validate([callback], TinyStage(branches=2))
        figures[str(branches)] = callback.figures[0]
    assert figures["[1]"].label == "pFID[tiny]@N=23,K=16,alpha={0.8},delta={4},branches={1}"
    assert len({figure.value for figure in figures.values()}) == 3
    shares = {name: figure.details["changed_share"]["a=0.8,d=4"] for name, figure in figures.items()}
    assert shares["[0]"] + shares["[1]"] == pytest.approx(shares["None"]) and shares["[0]"] == pytest.approx(
        0.3, abs=0.04
    )
    with pytest.raises(ConfigError, match=r"callbacks\.pfid\.branches=\[2\].*0 to 1"):
        validate([PerturbedFID(TinyFeatures(), branches=[2])], TinyStage(branches=2))


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
    "options",
    [
        {"alphas": []},
        {"alphas": [1.2]},
        {"deltas": []},
        {"deltas": [0]},
        {"deltas": [1.5]},
        {"seeds": []},
        {"seeds": [1, 1]},
        {"neighbors_of": "codes"},
        {"num_samples": 1},
    ],
)
def test_bad_settings(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        PerturbedFID(TinyFeatures(), **options)


def test_what_does_not_fit_is_refused_before_anything_is_measured(monkeypatch):
    monkeypatch.setattr(TinyStage, "validation_step", lambda *_: pytest.fail("measuring had begun"))
    with pytest.raises(ConfigError, match="codebook size 16"):
        run(deltas=[17])
    stage = TinyStage()
    stage.tokenizer.quantizer = GaussianBottleneck(4)
    with pytest.raises(ConfigError, match=r"pFID replaces codes.*has none; leave it out \(callbacks=continuous\)"):
        validate([PerturbedFID(TinyFeatures())], stage)


def _ranks(rank, world):
    figures = []
    for padded, batch_size in ((False, 4), (True, 5), (True, 8)):
        callback = PerturbedFID(TinyFeatures(), alphas=[0.9, 0.5], deltas=[4], seeds=[0, 1])
        validate([callback], TinyStage(), TinyData(batch_size=batch_size, padded=padded))
        figures.append(callback.figures[0])
    return [(figure.label, figure.value, figure.details["changed_share"]) for figure in figures]


def test_two_processes_equal_one():
    """Also with uneven last batches, and where a sampler repeats samples."""
    label, value, shares = _ranks(0, 1)[0]
    for answers in run_forked(_ranks):
        for answer in answers:
            assert answer[0] == label
            assert answer[1] == pytest.approx(value, rel=1e-5)
            assert answer[2] == pytest.approx(shares)
