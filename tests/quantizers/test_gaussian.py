"""The continuous bottleneck: sampling, divergence, draws by sample, refusals."""

from types import SimpleNamespace

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from golden_cases import assert_close
from tessera.backbones import TiTokDecoder, TiTokEncoder
from tessera.callbacks import CodebookReport
from tessera.errors import ConfigError
from tessera.perturbation import NearestCodePerturbation
from tessera.quantizers import GaussianBottleneck
from tessera.rng import IndexedRng, normal
from tessera.tokenizers import Tokenizer


def latent(batch: int = 3) -> torch.Tensor:
    return torch.randn(batch, 8, 1, 5, generator=torch.Generator().manual_seed(0))


def tokenizer() -> Tokenizer:
    sizes = {"resolution": 16, "num_latent_tokens": 5, "width": 16, "layers": 1, "heads": 2, "patch_size": 4}
    return Tokenizer(TiTokEncoder(**sizes), GaussianBottleneck(4), TiTokDecoder(**sizes), 16)


def test_evaluation_takes_the_mean_and_training_samples():
    bottleneck, z = GaussianBottleneck(4), latent()
    mean, log_variance = z.chunk(2, 1)
    assert torch.equal(bottleneck.eval()(z).z_q, mean)
    bottleneck.train()
    draws = torch.stack([bottleneck(z, torch.Generator().manual_seed(i)).z_q for i in range(2000)])
    assert_close(draws.mean(0), mean, atol=0.25, rtol=0)
    assert_close(draws.std(0).log() * 2, log_variance, atol=0.25, rtol=0)


def test_divergence():
    bottleneck, z = GaussianBottleneck(4), latent()
    mean, log_variance = z.chunk(2, 1)
    expected = kl_divergence(Normal(mean, (log_variance / 2).exp()), Normal(0.0, 1.0))
    assert_close(bottleneck(z).losses["kl"], expected.sum((1, 2, 3)).mean())
    assert_close(bottleneck.kl(mean, log_variance), expected.sum(1).flatten(1))
    zero = torch.zeros(1, 8, 1, 2)
    assert bottleneck(zero).losses["kl"] == 0


def test_log_variance_is_clamped():
    z = torch.full((1, 8, 1, 1), 100.0)
    _, log_variance = GaussianBottleneck(4).moments(z)
    assert log_variance.max() == 20
    _, log_variance = GaussianBottleneck(4).moments(-z)
    assert log_variance.min() == -30


def test_noise_belongs_to_the_sample():
    bottleneck, z = GaussianBottleneck(4), latent()
    whole = bottleneck(z, IndexedRng(0, torch.tensor([5, 6, 7]), step=2)).z_q
    alone = bottleneck(z[1:2], IndexedRng(0, torch.tensor([6]), step=2)).z_q
    assert torch.equal(whole[1:2], alone)
    assert not torch.equal(bottleneck(z, IndexedRng(0, torch.tensor([5, 6, 7]), step=3)).z_q, whole)


def test_normal_draws_are_finite_and_symmetric():
    ends = normal(torch.tensor([0.0, 0.5 - 2.0**-24, 0.5, 1 - 2.0**-24]))
    assert ends.isfinite().all() and 5 < ends[-1] < 6
    assert_close(ends, -ends.flip(0), atol=1e-6)
    draws = normal(torch.rand(100_000, generator=torch.Generator().manual_seed(0)))
    assert (
        abs(draws.mean()) < 0.02 and abs(draws.var() - 1) < 0.02 and abs((draws > 1.96).float().mean() - 0.025) < 0.002
    )


def test_in_a_tokenizer():
    model = tokenizer()
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    output = model(images, rng=IndexedRng(0, torch.arange(2)))
    assert output.tokens.shape == (2, 1, 0) and output.z.shape == (2, 8, 1, 5) and output.z_q.shape == (2, 4, 1, 5)
    (output.reconstruction.square().mean() + output.losses["kl"]).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    model.eval()
    assert torch.equal(model.reconstruct(images), model.reconstruct(images))
    assert len(model.fingerprint()) == 16


def test_whatever_needs_tokens_is_refused():
    model = tokenizer()
    images = torch.zeros(1, 3, 16, 16)
    with pytest.raises(ConfigError, match=r"tokenizing is not possible.*quantizer=single.*callbacks=continuous"):
        model.tokenize(images)
    with pytest.raises(ConfigError, match="no tokens"):
        model.detokenize(torch.zeros(1, 1, 0, dtype=torch.int64))
    with pytest.raises(ConfigError, match="neighbours of codes"):
        model.quantizer.neighbors(model.encode(images), 1)
    with pytest.raises(ConfigError, match="has none; choose perturbation=gaussian"):
        NearestCodePerturbation(alpha=0.5, beta=0.5, delta=2).check(model.quantizer)
    with pytest.raises(ConfigError, match="counting codes"):
        CodebookReport().begin(None, SimpleNamespace(tokenizer=model, device="cpu"))
    with pytest.raises(ConfigError, match=r"quantizer\.dim=0"):
        GaussianBottleneck(0)
    with pytest.raises(ValueError, match="8 channels of moments"):
        GaussianBottleneck(4)(torch.zeros(1, 4, 1, 1))
