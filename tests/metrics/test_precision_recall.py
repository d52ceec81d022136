import pytest
import torch

from forked import run_forked
from golden_cases import assert_close, golden
from tessera.errors import ConfigError, DataError
from tessera.metrics.precision_recall import (
    PrecisionRecall,
    in_manifolds,
    neighbour_radii,
    precision_recall,
    realism,
    squared_distances,
)


def sets(n: int = 40, m: int = 30, d: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return torch.randn(n, d, generator=g), 0.7 * torch.randn(m, d, generator=g) + 0.3


@pytest.mark.golden
@pytest.mark.parametrize("case", ["eval_prec_recall"])
def test_published_implementations(case):
    file = golden(case)
    config, out, compared = file.config["pr"], file.output, set()

    def take(key: str) -> torch.Tensor:
        compared.add(key)
        return out[key]

    for name, (n_real, n_generated, d) in config["sets"].items():
        real, generated = file.input[f"{name}/ref"], file.input[f"{name}/gen"]
        assert real.shape == (n_real, d) and generated.shape == (n_generated, d)
        ks = config["k"]
        radii = {"ref": neighbour_radii(real, ks, block=32), "gen": neighbour_radii(generated, ks, block=32)}
        sides = {"real_radii": radii["ref"], "generated_radii": radii["gen"]}
        inside = in_manifolds(real=real, generated=generated, **sides, block=32)
        values = {"precision": inside[0].double().mean(0), "recall": inside[1].double().mean(0)}

        for key in ("precision", "recall"):
            assert torch.equal(values[key], take(f"{name}/fp32/{key}")), key
            # distances in float16 move single samples across the boundary
            assert (values[key] - take(f"{name}/fp16/{key}")).abs().max() <= 5 / min(n_real, n_generated)
        for side, expected in radii.items():
            assert_close(expected, take(f"{name}/fp32/radii_{side}"), atol=1e-4, rtol=1e-4)
            assert_close(expected, take(f"{name}/fp16/radii_{side}"), atol=1.0, rtol=0.02)
        assert torch.equal(inside[0], take(f"{name}/fp32/in_manifold").bool())
        score, nearest = realism(real=real, generated=generated, real_radii=radii["ref"][:, 0], block=32)
        assert_close(score, take(f"{name}/fp32/realism"), atol=1e-4, rtol=1e-3)
        assert torch.equal(nearest, take(f"{name}/fp32/nearest").long())

        neighbours = {int(key.rsplit("_k", 1)[1]) for key in out if key.startswith(f"{name}/float64/precision_k")}
        for k in neighbours:
            exact = precision_recall(real=real, generated=generated, k=k)
            assert exact == tuple(float(take(f"{name}/float64/{key}_k{k}")) for key in ("precision", "recall"))
            for side, features in (("ref", real), ("gen", generated)):
                found = neighbour_radii(features, (k,))[:, 0]
                assert_close(found, take(f"{name}/float64/radii_{side}_k{k}"), 1e-9, 1e-9)
        library = [float(take(f"{name}/torch_fidelity/{key}")) for key in ("precision", "recall")]
        expected = precision_recall(real=real, generated=generated, k=3)
        assert expected == pytest.approx(library, abs=1e-7)  # float32 there
        corner = squared_distances(generated[:5], real[:5])
        if not torch.allclose(corner, out[f"{name}/float64/sqdist_5x5"]):
            corner = corner.T
        assert_close(corner, take(f"{name}/float64/sqdist_5x5"), 1e-9, 1e-9)
        assert_close(corner, take(f"{name}/fp32/sqdist_5x5"), 1e-3, 1e-4)
        assert_close(corner, take(f"{name}/fp16/sqdist_5x5"), 1.0, 0.02)
    assert compared == set(out)


def test_against_the_definition_with_any_block():
    real, generated = sets()

    def radius(points, k):
        return torch.cdist(points.double(), points.double()).sort(1).values[:, k]

    cross = torch.cdist(generated.double(), real.double())
    for k in (1, 3):
        expected = (
            float((cross <= radius(real, k)).any(1).double().mean()),
            float((cross <= radius(generated, k)[:, None]).any(0).double().mean()),
        )
        assert 0 < expected[0] < 1 and expected[0] != expected[1]
        for block in (7, 30, 1000):
            assert precision_recall(real=real, generated=generated, k=k, block=block) == expected


def test_repeated_points_have_radius_zero_and_still_count():
    real, generated = sets()
    real[:4], generated[0] = real[0], real[0]
    assert torch.equal(neighbour_radii(1000 * real)[:4], torch.zeros(4, 1, dtype=torch.float64))
    radii = {"real_radii": neighbour_radii(real), "generated_radii": neighbour_radii(generated)}
    far = torch.full_like(radii["real_radii"], -1.0)
    far[:4] = 0
    inside, _ = in_manifolds(real=real, generated=generated, real_radii=far, generated_radii=radii["generated_radii"])
    assert inside[0, 0] and not inside[1:].any()


def test_metric_equals_the_function():
    real, generated = sets()
    metric = PrecisionRecall(6, k=2)
    for part in real.split(9):
        metric.update(part, real=True)
    metric.update(torch.cat([generated, generated]), real=False, mask=torch.arange(60) < 30)
    expected = precision_recall(real=real, generated=generated, k=2)
    assert tuple(metric.compute().tolist()) == expected
    restored = PrecisionRecall(6, k=2)
    restored.load_state_dict(metric.state_dict())
    assert tuple(restored.compute().tolist()) == expected
    metric.half()
    metric.set_dtype(torch.float16)
    assert metric.rows(True).dtype == torch.float32


def test_installed_library_agrees():
    from torch_fidelity.metric_prc import prc_features_to_metric

    real, generated = sets()
    theirs = prc_features_to_metric(generated, real, prc_neighborhood=3, verbose=False)
    expected = precision_recall(real=real, generated=generated)
    assert [theirs["precision"], theirs["recall"]] == pytest.approx(expected, abs=1e-6)


def test_bad_input():
    real, generated = sets()
    with pytest.raises(TypeError):
        precision_recall(real, generated)  # which is which must be said
    with pytest.raises(DataError, match="at least 4"):
        precision_recall(real=real[:3], generated=generated)
    with pytest.raises(DataError, match="6 and 5 features"):
        precision_recall(real=real, generated=generated[:, :5])
    with pytest.raises(ConfigError, match="k=0"):
        PrecisionRecall(6, k=0)
    with pytest.raises(DataError, match="expected"):
        PrecisionRecall(5).update(real, real=True)
    generated[3] = float("inf")
    with pytest.raises(DataError, match="sample 3 are NaN or infinite"):
        PrecisionRecall(6).update(generated, real=False)


def _uneven(rank, world, real, generated):
    metric = PrecisionRecall(6)
    own = slice(0, 11) if rank == 0 else slice(11, None)
    for part in real[own].split(4):
        metric.update(part, real=True)
    if rank == 1:  # the other one has none
        metric.update(generated, real=False)
    return metric.compute().tolist()


def test_two_processes_equal_one():
    real, generated = sets()
    expected = list(precision_recall(real=real, generated=generated))
    assert run_forked(_uneven, real, generated) == [expected] * 2
