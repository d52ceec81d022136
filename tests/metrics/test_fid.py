import pytest
import torch

from forked import run_forked
from golden_cases import golden
from tessera.errors import DataError
from tessera.metrics.fid import FrechetDistance, frechet_distance, lower_sandwich, moments, trace_root_product
from tessera.metrics.statistics import Statistics


def distance(real: torch.Tensor, fake: torch.Tensor) -> FrechetDistance:
    metric = FrechetDistance(real.shape[1])
    metric.update(real, real=True)
    metric.update(fake, real=False)
    return metric


def features(n: int, d: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=g) @ (torch.eye(d) + 0.2 * torch.randn(d, d, generator=g)) * scale


@pytest.mark.golden
@pytest.mark.parametrize("case", ["eval_fid_stats"])
def test_published_implementations(case):
    file = golden(case)
    assert file.config["sets"]
    for name, (n_real, n_fake, d) in file.config["sets"].items():
        real, fake = file.input[f"{name}/real"], file.input[f"{name}/fake"]
        assert (len(real), len(fake), real.shape[1]) == (n_real, n_fake, d)
        metric = distance(real, fake)
        for side, is_real in (("real", True), ("fake", False)):
            statistics = metric.statistics(is_real)
            torch.testing.assert_close(statistics.mu, file.output[f"{name}/{side}_mu64"], atol=1e-12, rtol=1e-12)
            torch.testing.assert_close(statistics.sigma, file.output[f"{name}/{side}_sigma"], atol=1e-12, rtol=1e-10)
            # what ADM keeps: a mean that numpy sums in float32
            torch.testing.assert_close(statistics.mu.float(), file.output[f"{name}/{side}_mu32"], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(statistics.sigma.trace(), file.output[f"{name}/trace_{side}"])
        value = metric.compute()
        assert value.dtype == torch.float64
        full_rank = min(n_real, n_fake) > d
        for key in ("fid_adm", "fid_seedvoken", "fid_torch_fidelity", "fid_torchmetrics", "fid_cleanfid"):
            expected = float(file.output[f"{name}/{key}"])
            tolerance = 1e-6 * abs(expected) if full_rank else 1e-4
            assert abs(float(value) - expected) <= tolerance, (name, key, float(value), expected)
        mean_term = (metric.statistics(True).mu - metric.statistics(False).mu).square().sum()
        assert abs(float(mean_term) - float(file.output[f"{name}/fid_mean_term"])) < 1e-6
        itself = float(distance(real, real).compute())
        assert abs(itself) < 1e-6
        # eigenvalues of a rank-deficient product have rounding errors whose roots add up
        assert abs(itself - float(file.output[f"{name}/fid_self_torchmetrics"])) < 1e-4
        assert float(value) == pytest.approx(
            float(file.output[f"{name}/fid_torchmetrics_float32_out"]), rel=1e-4, abs=1e-4
        )


@pytest.mark.golden
@pytest.mark.parametrize("case", ["eval_fid_merge"])
def test_merging(case):
    file = golden(case)
    real, fake, rank_of = file.input["real"], file.input["fake"], file.input["rank_of_sample"]
    d = file.config["d"]
    assert real.shape == (file.config["n"], d)
    merged, rank_fids = FrechetDistance(d), []
    for rank in range(file.config["ranks"]):
        part = distance(real[rank_of == rank], fake[rank_of == rank])
        for side in ("real", "fake"):
            assert int(getattr(part, f"{side}_n")) == int(file.output[f"rank{rank}/{side}_count"])
            torch.testing.assert_close(getattr(part, f"{side}_sum"), file.output[f"rank{rank}/{side}_sum"])
            torch.testing.assert_close(getattr(part, f"{side}_outer"), file.output[f"rank{rank}/{side}_outer_sum"])
            for state in ("n", "sum", "outer"):
                key = f"{side}_{state}"
                setattr(merged, key, getattr(merged, key) + getattr(part, key))
        rank_fids.append(float(part.compute()))
        assert abs(rank_fids[-1] - float(file.output[f"rank{rank}/fid"])) < 1e-4
    for side, is_real in (("real", True), ("fake", False)):
        statistics = merged.statistics(is_real)
        assert statistics.n == int(file.output[f"merged/{side}_count"])
        torch.testing.assert_close(statistics.mu, file.output[f"merged/{side}_mu"])
        torch.testing.assert_close(statistics.sigma, file.output[f"merged/{side}_sigma"])
    expected = float(file.output["single_process/fid"])
    assert abs(float(frechet_of(merged)) - expected) < 1e-9 * max(1, expected)
    assert abs(float(frechet_of(merged)) - float(file.output["merged/fid"])) < 1e-9 * max(1, expected)
    assert abs(float(distance(real, fake).compute()) - expected) < 1e-9 * max(1, expected)
    wrong = float(file.output["mean_of_rank_fids_wrong"])
    assert abs(sum(rank_fids) / len(rank_fids) - wrong) < 1e-4

    world = file.config["world"]
    indices = torch.cat([file.output[f"padded/rank{rank}_indices"] for rank in range(world)])
    assert len(indices) == int(file.output["padded/count"])
    padded = distance(real[indices], fake[indices])
    assert abs(float(padded.compute()) - float(file.output["padded/fid_with_duplicates"])) < 1e-6
    # the first time each index appears counts, repeats are masked
    first = torch.tensor([i not in set(indices[:k].tolist()) for k, i in enumerate(indices.tolist())])
    masked = FrechetDistance(d)
    masked.update(real[indices], real=True, mask=first)
    masked.update(fake[indices], real=False, mask=first)
    assert abs(float(masked.compute()) - expected) < 1e-9 * max(1, expected)
    kept = int(file.output["drop_last/count"])
    assert abs(float(distance(real[:kept], fake[:kept]).compute()) - float(file.output["drop_last/fid"])) < 1e-6


def frechet_of(metric: FrechetDistance) -> torch.Tensor:
    real, fake = metric.statistics(True), metric.statistics(False)
    return frechet_distance(real.mu, real.sigma, fake.mu, fake.sigma, real.n, fake.n)


def test_installed_libraries_agree():
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torchmetrics.image.fid import FrechetInceptionDistance

    real, fake = features(90, 12, 1), features(70, 12, 2, 1.3)
    value = float(distance(real, fake).compute())
    sides = [fid_features_to_statistics(side) for side in (fake, real)]
    fidelity = fid_statistics_to_metric(*sides, verbose=False)["frechet_inception_distance"]
    identity = torch.nn.Identity()
    identity.num_features = 12
    metric = FrechetInceptionDistance(feature=identity).set_dtype(torch.float64)
    metric.update(real.double(), real=True)
    metric.update(fake.double(), real=False)
    # torch-fidelity's means are float32
    assert value == pytest.approx(float(metric.compute()), rel=1e-9) and value == pytest.approx(fidelity, rel=1e-6)


def test_known_value_of_two_gaussians():
    # commuting covariances: tr (S1 S2)^{1/2} = sum sqrt(a b)
    a, b = torch.tensor([1.0, 4.0, 9.0]), torch.tensor([4.0, 1.0, 0.25])
    mu = torch.tensor([1.0, -1.0, 2.0])
    expected = 6 + float((a.sqrt() - b.sqrt()).square().sum())
    value = frechet_distance(torch.zeros(3), a.diag(), mu, b.diag())
    assert abs(float(value) - expected) < 1e-12


def test_rank_deficient_and_dead_features_are_finite_and_exact():
    real, fake = features(40, 12, 1), features(50, 12, 2)
    real[:, 3] = fake[:, 3] = 0  # a unit that never fires
    full = float(distance(real, fake).compute())
    keep = [i for i in range(12) if i != 3]
    assert abs(full - float(distance(real[:, keep], fake[:, keep]).compute())) < 1e-9
    constant = distance(torch.ones(5, 3), torch.zeros(5, 3))
    assert float(constant.compute()) == 3
    # fewer samples than features: singular values of the centred sets are the reference
    x, y = features(9, 30, 3).double(), features(7, 30, 4).double()
    xc, yc = (x - x.mean(0)) / 8**0.5, (y - y.mean(0)) / 6**0.5
    root = torch.linalg.svdvals(xc @ yc.T).sum()
    expected = (x.mean(0) - y.mean(0)).square().sum() + xc.square().sum() + yc.square().sum() - 2 * root
    assert abs(float(distance(x, y).compute()) - float(expected)) < 1e-9
    assert abs(float(distance(y, x).compute()) - float(expected)) < 1e-9


def test_cholesky_and_eigenvectors_agree():
    s1, s2 = (features(100, 16, seed).double().T.cov() for seed in (5, 6))
    by_cholesky = trace_root_product(s1, s2)
    values, vectors = torch.linalg.eigh(s1)
    root = vectors * values.sqrt()
    by_vectors = torch.linalg.eigvalsh(root.T @ s2 @ root).sqrt().sum()
    assert abs(float(by_cholesky - by_vectors)) < 1e-10


def test_any_split_into_batches_is_the_same():
    real, fake = features(61, 10, 7), features(83, 10, 8, 1.2)
    expected = float(distance(real, fake).compute())
    for size in (1, 17, 60):
        metric = FrechetDistance(10)
        for part in real.split(size):
            metric.update(part, real=True)
        for part in fake.split(size):
            metric.update(part, real=False)
        assert abs(float(metric.compute()) - expected) < 1e-9


def test_state_survives_a_reload_without_update():
    metric = distance(features(40, 6, 1), features(40, 6, 2))
    expected = metric.compute()
    fresh = FrechetDistance(6)
    fresh.load_state_dict(metric.state_dict())
    assert fresh.compute() == expected
    # a result cached before the reload is not served after it
    other = distance(features(40, 6, 3), features(40, 6, 4))
    other.compute()
    other.load_state_dict(metric.state_dict())
    assert other.compute() == expected


def test_fixed_reference():
    real, fake = features(50, 6, 1), features(40, 6, 2)
    mu, sigma = moments(50, real.double().sum(0), real.double().T @ real.double())
    metric = FrechetDistance(6, reference=Statistics(mu, sigma, 50))
    metric.update(fake, real=False)
    assert abs(float(metric.compute()) - float(distance(real, fake).compute())) < 1e-9
    with pytest.raises(DataError, match="fixed reference"):
        metric.update(real, real=True)
    with pytest.raises(DataError, match="same extractor"):
        FrechetDistance(7, reference=Statistics(mu, sigma, 50))


def test_bad_features_are_refused():
    metric = FrechetDistance(4)
    x = torch.zeros(5, 4)
    x[2, 1] = float("nan")
    with pytest.raises(DataError, match="sample 2 "):
        metric.update(x, real=True)
    with pytest.raises(DataError, match="sample 17 "):
        metric.update(x, real=True, index=torch.tensor([15, 16, 17, 18, 19]))
    assert int(metric.real_n) == 0
    metric.update(x, real=True, mask=torch.tensor([True, True, False, True, True]))
    assert int(metric.real_n) == 4
    with pytest.raises(DataError, match="expected \\(N, 4\\)"):
        metric.update(torch.zeros(5, 3), real=True)
    metric.update(torch.ones(1, 4), real=False)
    with pytest.raises(DataError, match="at least 2 samples"):
        metric.compute()
    with pytest.raises(DataError, match="different extractors"):
        frechet_distance(torch.zeros(3), torch.eye(3), torch.zeros(4), torch.eye(4))


def test_sums_stay_float64_and_half_features_are_accepted():
    metric = FrechetDistance(4)
    metric.half()
    metric.set_dtype(torch.float16)
    metric.update(features(10, 4, 1).bfloat16(), real=True)
    assert metric.real_sum.dtype == metric.real_outer.dtype == torch.float64


def _two_processes(rank, world, real, fake):
    metric = FrechetDistance(real.shape[1])
    # uneven: rank 0 has 13 rows in 3 batches, rank 1 the rest in one; the last rank may have none of a side
    for part in real[:13].split(5) if rank == 0 else [real[13:]]:
        metric.update(part, real=True)
    if rank == 0:
        metric.update(fake, real=False)
    value = float(metric.compute())
    return value, int(metric.real_n)


def test_two_processes_equal_one():
    real, fake = features(37, 8, 1), features(29, 8, 2)
    expected = float(distance(real, fake).compute())
    answers = run_forked(_two_processes, real, fake)
    assert all(abs(value - expected) < 1e-9 for value, _ in answers)
    assert [n for _, n in answers] == [13, 24]  # the state stays per process


@pytest.mark.parametrize(("d", "leaf"), [(1, 1), (7, 3), (16, 4), (33, 8), (33, 64)])
def test_lower_sandwich_is_the_product(d, leaf):
    root, sigma = features(60, d, 1).double().T.cov().view(d, d), features(60, d, 2).double().T.cov().view(d, d)
    root = torch.linalg.cholesky(root)
    expected = (root.T @ sigma @ root).tril()
    torch.testing.assert_close(lower_sandwich(root, sigma, leaf).tril(), expected)
