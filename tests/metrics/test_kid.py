import pytest
import torch

from forked import run_forked
from golden_cases import golden
from tessera.errors import ConfigError, DataError
from tessera.metrics.kid import KernelDistance, squared_mmd, subset_distances


def sets(n: int = 40, m: int = 30, d: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return torch.randn(n, d, generator=g), 0.7 * torch.randn(m, d, generator=g) + 0.3


@pytest.mark.golden
@pytest.mark.parametrize("case", ["eval_kid"])
def test_published_implementations(case):
    file = golden(case)
    config, out, compared = file.config, file.output, set()
    real, fake = file.input["real"], file.input["fake"]
    assert real.shape == (config["n1"], config["d"]) and fake.shape == (config["n2"], config["d"])

    def close(actual: torch.Tensor, key: str, tolerance: float = 1e-9) -> None:
        torch.testing.assert_close(actual, out[key], rtol=tolerance, atol=tolerance)
        compared.add(key)

    def estimates(real_key: str, fake_key: str, **kernel) -> torch.Tensor:
        chosen = [(out[real_key], real), (out[fake_key], fake)]
        compared.update((real_key, fake_key))
        assert all(index.shape == (config["subsets"], config["subset_size"]) for index, _ in chosen)
        return torch.stack(
            [squared_mmd(*(side[index[i]] for index, side in chosen), **kernel) for i in range(config["subsets"])]
        )

    values = estimates("subset_indices_real", "subset_indices_fake")
    close(values, "subset_mmd2")
    close(values.mean(), "torch_fidelity/mean", 1e-6)
    close(values.std(correction=0), "torch_fidelity/std", 1e-6)
    for key in (key for key in out if key.startswith("torch_fidelity_rbf")):
        sigma = float(key.removeprefix("torch_fidelity_rbf").split("/")[0])
        values = estimates("subset_indices_real", "subset_indices_fake", kernel="rbf", sigma=sigma)
        close(values.mean(), key, 1e-6)
    values = estimates("torchmetrics/indices_real", "torchmetrics/indices_fake")
    close(values.mean(), "torchmetrics/mean", 1e-6)
    close(values.std(correction=0), "torchmetrics/std", 1e-6)
    values = estimates("cleanfid/indices_real", "cleanfid/indices_fake")
    close(values.mean(), "cleanfid/kid", 1e-5)
    both = min(len(real), len(fake))
    close(squared_mmd(real[:both], fake[:both]), "full_mmd2_first_n")
    # the file doesn't name these options; its number determines them
    other = {"degree": 2, "gamma": config.get("gamma", 0.05), "coef": config.get("coef", 0.5)}
    close(squared_mmd(real[:both], fake[:both], **other), "full_mmd2_deg2_gamma_coef")
    assert compared == set(out)


def test_against_the_definition_with_any_block():
    x, y = (side.double() for side in sets())
    k = [((a @ b.T) / 6 + 1) ** 3 for a, b in ((x, x), (y, y), (x, y))]
    expected = (k[0].sum() - k[0].trace()) / (40 * 39) + (k[1].sum() - k[1].trace()) / (30 * 29) - 2 * k[2].mean()
    for block in (7, 1000):
        torch.testing.assert_close(squared_mmd(x, y, block=block), expected)
    rbf = [torch.exp(-(torch.cdist(a, b) ** 2) / 8) for a, b in ((x, x), (y, y), (x, y))]
    expected = (rbf[0].sum() - 40) / (40 * 39) + (rbf[1].sum() - 30) / (30 * 29) - 2 * rbf[2].mean()
    torch.testing.assert_close(squared_mmd(x, y, kernel="rbf", sigma=2.0), expected)


def test_unbiased_on_equal_distributions():
    g = torch.Generator().manual_seed(0)
    values = [squared_mmd(*(torch.randn(12, 4, generator=g) for _ in range(2))) for _ in range(300)]
    values = torch.stack(values)
    assert values.mean().abs() < 3 * values.std() / 300**0.5 and values.min() < 0


def test_installed_libraries_agree():
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torchmetrics.image.kid import KernelInceptionDistance

    real, fake = (side[:30] for side in sets())
    expected = float(squared_mmd(real, fake))
    theirs = kid_features_to_metric(fake, real, kid_subsets=1, kid_subset_size=30, verbose=False)
    assert theirs["kernel_inception_distance_mean"] == pytest.approx(expected, rel=1e-5)
    other = KernelInceptionDistance(feature=torch.nn.Identity(), subsets=1, subset_size=30).set_dtype(torch.float64)
    other.update(real.double(), real=True)
    other.update(fake.double(), real=False)
    assert float(other.compute()[0]) == pytest.approx(expected, rel=1e-9)


def test_subsets_follow_from_seed_and_indices_alone():
    real, fake = sets()
    expected = subset_distances(real, fake, subsets=5, subset_size=20, seed=3)
    metric = KernelDistance(6, subsets=5, subset_size=20, seed=3)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    before = torch.get_rng_state()
    for part in order.split(7):
        metric.update(real[part], real=True, index=part)
    metric.update(fake, real=False)
    assert torch.equal(metric.values(), expected) and torch.equal(before, torch.get_rng_state())
    assert metric.compute() == expected.mean()
    assert not torch.equal(subset_distances(real, fake, subsets=5, subset_size=20, seed=4), expected)


def test_bad_input():
    real, fake = sets()
    with pytest.raises(DataError, match=r"subset_size=1000.*40 real or 30 generated"):
        subset_distances(real, fake)
    with pytest.raises(DataError, match="at least 2 samples"):
        squared_mmd(real[:1], fake)
    with pytest.raises(DataError, match="6 and 5 features"):
        squared_mmd(real, fake[:, :5])
    with pytest.raises(ConfigError, match="kernel='linear'"):
        squared_mmd(real, fake, kernel="linear")
    with pytest.raises(ConfigError, match="kernel='linear'"):
        KernelDistance(6, kernel="linear")
    with pytest.raises(ConfigError, match="subset_size=1"):
        KernelDistance(6, subset_size=1)


def _uneven(rank, world, real, fake):
    metric = KernelDistance(6, subsets=3, subset_size=10)
    for number in range(rank, len(real), world):  # interleaved, one by one
        metric.update(real[number : number + 1], real=True, index=torch.tensor([number]))
    if rank == 0:
        metric.update(fake, real=False)
    return float(metric.compute())


def test_two_processes_equal_one():
    real, fake = sets()
    expected = float(subset_distances(real, fake, subsets=3, subset_size=10).mean())
    assert run_forked(_uneven, real, fake) == [expected] * 2
