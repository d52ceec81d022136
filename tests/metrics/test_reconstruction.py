import math

import pytest
import torch

from forked import run_forked
from golden_cases import golden
from tessera.errors import ConfigError, DataError
from tessera.metrics.reconstruction import PSNR, SSIM, psnr, ssim, unit_range


def pair(n: int = 4, size: int = 16, noise: float = 0.2):
    g = torch.Generator().manual_seed(n)
    images = torch.rand(n, 3, size, size, generator=g) * 2 - 1
    return images, (images + noise * torch.randn(images.shape, generator=g)).clamp(-1, 1)


@pytest.mark.golden
@pytest.mark.parametrize("case", ["eval_psnr_ssim"])
def test_flavours_of_public_code(case):
    file = golden(case)
    gt, rec = file.input["images_pm1"], file.input["recon_pm1"]
    config, out = file.config, file.output
    assert gt.shape == (config["n"], 3, config["h"], config["w"])

    def close(actual, key, atol=1e-6):
        expected = out[key].double()
        torch.testing.assert_close(actual.double(), expected, atol=atol, rtol=atol, msg=lambda m: f"{key}: {m}")

    def u8(images):
        return (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1)

    truncated = unit_range(gt, "truncate"), unit_range(rec, "truncate")
    assert torch.equal(u8(truncated[0]), out["seedvoken/gt_uint8"])
    assert torch.equal(u8(truncated[1]), out["seedvoken/rec_uint8"])
    # scikit-image works in float32 there
    close(psnr(truncated[1], truncated[0]), "seedvoken/psnr", 1e-5)
    close(ssim(truncated[1], truncated[0]), "seedvoken/ssim", 1e-5)
    for name, values in (("psnr", psnr(*truncated)), ("ssim", ssim(*truncated))):
        batches = torch.stack([batch.mean() for batch in values.split(config["batch"])])
        close(batches.mean(), f"seedvoken/mean_of_batch_means_{name}", 1e-5)

    plain, rounded = unit_range(gt, "none"), unit_range(rec, "half-up")
    assert torch.equal(u8(rounded), out["llamagen/rec_uint8"])
    close(psnr(rounded, plain), "llamagen/psnr", 1e-5)
    close(ssim(rounded, plain, data_range=1.0), "llamagen/ssim_data_range_1", 1e-5)
    close(ssim(rounded, plain, data_range=2.0), "llamagen/ssim_data_range_2", 1e-5)

    grid = unit_range(gt, "half-up")
    close(ssim(*truncated, window="gauss11"), "skimage_gaussian/ssim", 1e-5)
    raw = unit_range(rec, "none")
    close(ssim(raw, plain, window="gauss11"), "skimage_gaussian_unquantised/ssim")
    close(ssim(raw, plain, window="gauss11"), "torchmetrics/ssim_full_image_cropped_5px_float64")
    close(ssim(raw, plain, window="gauss11", border="reflect"), "torchmetrics/ssim_float64")
    close(ssim(raw, plain, window="gauss11", border="reflect"), "torchmetrics/ssim", 1e-5)
    close(ssim(raw, plain, window="gauss11", border="reflect").mean(), "torchmetrics/ssim_mean", 1e-5)
    close(ssim(rounded, grid, window="gauss11", border="reflect"), "torchmetrics/ssim_rounded_grid")
    close(ssim(raw, plain, border="reflect", covariance="population"), "torchmetrics/ssim_uniform7")
    close(psnr(raw, plain), "torchmetrics/psnr_per_image_float64")
    close(psnr(raw, plain), "torchmetrics/psnr_per_image", 1e-5)
    close(psnr(raw, plain).mean(), "torchmetrics/psnr_mean_per_image", 1e-5)
    close(psnr(rounded, grid), "torchmetrics/psnr_rounded_grid")
    pooled = 10 * torch.log10(1 / (raw - plain).square().mean())
    close(pooled, "torchmetrics/psnr_pooled_mse", 1e-5)

    # the reported figure is the mean over images of the rounded flavour, whatever the batches
    metric = PSNR()
    for a, b in zip(rec.split(config["batch"]), gt.split(config["batch"]), strict=True):
        metric.update(a.clamp(-1, 1), b)  # as the public code does
    expected = out["torchmetrics/psnr_rounded_grid"].mean()
    torch.testing.assert_close(metric.compute(), expected, atol=1e-6, rtol=1e-6)


def test_installed_libraries_agree():
    from skimage.metrics import peak_signal_noise_ratio, structural_similarity
    from torchmetrics.functional.image import structural_similarity_index_measure

    images, recon = (unit_range(side) for side in pair())
    arrays = [(a.permute(1, 2, 0).numpy(), b.permute(1, 2, 0).numpy()) for a, b in zip(images, recon, strict=True)]
    theirs = {"psnr": [], "uniform7": [], "gauss11": []}
    gauss = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    for a, b in arrays:
        theirs["psnr"].append(peak_signal_noise_ratio(a, b, data_range=1))
        theirs["uniform7"].append(structural_similarity(a, b, channel_axis=-1, data_range=1))
        theirs["gauss11"].append(structural_similarity(a, b, channel_axis=-1, data_range=1, **gauss))
    assert psnr(recon, images).tolist() == pytest.approx(theirs["psnr"], rel=1e-9)
    for window in ("uniform7", "gauss11"):
        assert ssim(recon, images, window).tolist() == pytest.approx(theirs[window], rel=1e-6)
    whole = structural_similarity_index_measure(recon, images, data_range=1.0, reduction="none")
    torch.testing.assert_close(ssim(recon, images, "gauss11", border="reflect"), whole)


def test_perfect_images_have_a_policy():
    images, recon = pair()
    recon[0] = images[0]
    metric = PSNR()
    metric.update(recon, images)
    assert int(metric.perfect) == 1
    expected = psnr(unit_range(recon[1:]), unit_range(images[1:])).mean()
    torch.testing.assert_close(metric.compute(), expected)
    capped = PSNR(infinite=100)
    capped.update(recon, images)
    torch.testing.assert_close(capped.compute(), (expected * 3 + 100) / 4)
    all_perfect = PSNR()
    all_perfect.update(images, images)
    assert math.isinf(float(all_perfect.compute()))
    assert float(ssim(images, images).mean()) == pytest.approx(1)
    with pytest.raises(ConfigError, match="infinite"):
        PSNR(infinite="drop")


def test_masked_rows_and_batches_do_not_matter():
    images, recon = pair(6)
    for make in (PSNR, SSIM, lambda: SSIM("gauss11")):
        whole, parts = make(), make()
        whole.update(recon, images)
        parts.update(recon[:1], images[:1])
        parts.update(torch.cat([recon[1:], recon[:2]]), torch.cat([images[1:], images[:2]]), torch.arange(7) < 5)
        torch.testing.assert_close(whole.compute(), parts.compute())
        restored = make()
        restored.load_state_dict(whole.state_dict())
        torch.testing.assert_close(restored.compute(), whole.compute())


def test_uint8_and_float_of_the_same_image_are_equal():
    images, recon = pair()
    as_u8 = [(unit_range(x) * 255).round().to(torch.uint8) for x in (recon, images)]
    torch.testing.assert_close(SSIM().values(recon, images), SSIM().values(*as_u8))
    torch.testing.assert_close(PSNR().values(recon.bfloat16(), images), PSNR().values(recon.bfloat16().float(), images))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: ssim(x, x[:1]), "equal shape"),
        (lambda x: ssim(x[..., :5], x[..., :5]), "7x7 window"),
        (lambda x: ssim(x, x, window="box"), "window='box'"),
        (lambda x: ssim(x, x, border="zero"), "border='zero'"),
        (lambda x: ssim(x, x, covariance="none"), "covariance='none'"),
        (lambda x: SSIM("box"), "window='box'"),
        (lambda x: PSNR(quantisation="floor"), "quantisation='floor'"),
        (lambda x: unit_range(x, "floor"), "quantisation='floor'"),
        (lambda x: PSNR().compute(), "no image"),
        (lambda x: PSNR().update(x + 1.01, x), r"100\.00% of the pixels are outside \[-1, 1\]"),
        (lambda x: SSIM(quantisation="none").update(x, 255 * (x + 1)), "rescale images in another range"),
        (lambda x: SSIM().update(x.long(), x), "int64"),
        (lambda x: PSNR().update(x[:, :1], x[:, :1]), r"\(B, 3, H, W\), not \(2, 1, 16, 16\)"),
    ],
)
@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_bad_input(call, message):
    with pytest.raises((ConfigError, DataError), match=message):
        call(torch.zeros(2, 3, 16, 16))


def _two_processes(rank, world, recon, images):
    part = slice(0, 5) if rank == 0 else slice(5, None)
    answers = []
    for make in (PSNR, SSIM):
        metric = make()
        metric.update(recon[part], images[part])
        answers.append(float(metric.compute()))
    return answers


def test_two_processes_equal_one():
    images, recon = pair(7)
    expected = [float(psnr(unit_range(recon), unit_range(images)).mean())]
    expected.append(float(ssim(unit_range(recon), unit_range(images)).mean()))
    for answers in run_forked(_two_processes, recon, images):
        assert answers == pytest.approx(expected, abs=1e-12)
