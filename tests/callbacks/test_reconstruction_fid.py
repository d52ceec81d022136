import pytest
import torch

from figure_setup import TinyData, TinyFeatures, TinyStage, validate
from forked import run_forked
from tessera.callbacks import GenerationFID, ReconstructionFID, ReconstructionQuality
from tessera.errors import ConfigError, DataError
from tessera.metrics import DigitsFeatures
from tessera.metrics.fid import FrechetDistance
from tessera.metrics.image_sets import subset_numbers
from tessera.metrics.reconstruction import psnr, ssim, unit_range


def expected_rfid(data: TinyData, stage: TinyStage) -> float:
    images = data.val.images
    with torch.no_grad():
        recon = stage.tokenizer.reconstruct(images)
    metric, extractor = FrechetDistance(12), TinyFeatures()
    metric.update(extractor(images), real=True)
    metric.update(extractor(recon), real=False)
    return float(metric.compute())


@pytest.mark.parametrize("batch_size", [5, 8, 23])
def test_figure_label_and_log_key(batch_size):
    stage, data = TinyStage(), TinyData(batch_size=batch_size)
    callback = ReconstructionFID(TinyFeatures())
    trainer = validate([callback], stage, data)
    (figure,) = callback.figures
    assert figure.label == "rFID[tiny]@N=23"
    assert figure.value == pytest.approx(expected_rfid(data, stage), rel=1e-6)
    assert float(trainer.callback_metrics["val/rfid[tiny]@N=23"]) == pytest.approx(figure.value, rel=1e-6)
    assert figure.protocol.reference == "inputs" and figure.protocol.crop == "centre"
    assert stage.state_dict() and not any("extractor" in key for key in stage.state_dict())


def test_quality_is_per_image():
    stage, data = TinyStage(), TinyData()
    callback = ReconstructionQuality()
    validate([callback], stage, data)
    with torch.no_grad():
        recon = stage.tokenizer.reconstruct(data.val.images)
    pair = unit_range(recon), unit_range(data.val.images)
    values = {figure.label: figure.value for figure in callback.figures}
    assert values["PSNR@N=23"] == pytest.approx(float(psnr(*pair).mean()), abs=1e-4)
    assert values["SSIM[uniform7]@N=23"] == pytest.approx(float(ssim(*pair).mean()), abs=1e-4)


def test_a_quick_figure_takes_the_same_images_in_any_batches():
    stage, data = TinyStage(), TinyData()
    chosen = subset_numbers(23, 9)
    images = data.val.images[chosen]
    with torch.no_grad():
        recon = stage.tokenizer.reconstruct(images)
    expected = float(psnr(unit_range(recon), unit_range(images)).mean())
    for batch_size in (2, 8):  # of two, some have none of the chosen images
        callback = ReconstructionQuality(num_samples=9)
        validate([callback], stage, TinyData(batch_size=batch_size))
        assert [figure.label for figure in callback.figures] == ["PSNR@N=9", "SSIM[uniform7]@N=9"]
        assert callback.figures[0].value == pytest.approx(expected, rel=1e-5)
    assert set(subset_numbers(23, 5).tolist()) < set(chosen.tolist())
    with pytest.raises(ConfigError, match="num_samples=24 must be between 2 and the 23 images"):
        validate([ReconstructionFID(TinyFeatures(), num_samples=24)], stage, data)
    with pytest.raises(ConfigError, match="num_samples=1 must be at least 2"):
        ReconstructionQuality(num_samples=1)


def test_networks_that_measure_are_in_no_checkpoint(tmp_path):
    callbacks = [ReconstructionFID(DigitsFeatures()), ReconstructionQuality(), GenerationFID(DigitsFeatures(), 4)]
    trainer = validate(callbacks, data=TinyData(val=4, train=6))
    trainer.save_checkpoint(tmp_path / "all.ckpt")
    content = torch.load(tmp_path / "all.ckpt", weights_only=True)
    assert set(content["state_dict"]) == set(TinyStage().state_dict())
    saved = [value for state in content["callbacks"].values() for value in state.values()]
    assert saved == [1, 1, 1]  # the cadence is all that callbacks save


def test_cadence_is_kept_across_a_resume():
    callback = ReconstructionFID(TinyFeatures(), every_n_validations=2)
    seen = []
    for _ in range(3):
        callback.figures = []
        validate([callback])
        seen.append(bool(callback.figures))
    assert seen == [True, False, True]
    resumed = ReconstructionFID(TinyFeatures(), every_n_validations=2)
    resumed.load_state_dict(callback.state_dict())
    validate([resumed])
    assert resumed.figures == []


def test_a_stage_without_reconstructions_is_told():
    class Silent(TinyStage):
        def validation_step(self, batch, batch_index):
            return None

    with pytest.raises(ConfigError, match="ReconstructionFID needs `reconstruction`"):
        validate([ReconstructionFID(TinyFeatures())], Silent())
    with pytest.raises(ConfigError, match="every_n_validations=0"):
        ReconstructionFID(TinyFeatures(), every_n_validations=0)


def test_diverged_reconstructions_name_the_sample():
    class Diverged(TinyStage):
        def validation_step(self, batch, batch_index):
            out = super().validation_step(batch, batch_index)
            return out | {"reconstruction": out["reconstruction"].masked_fill(batch["index"].view(-1, 1, 1, 1) == 9, 1)}

    class Broken(TinyFeatures):
        def features(self, images_u8):
            rows = super().features(images_u8)
            return rows.masked_fill((images_u8 == 255).flatten(1).all(1)[:, None], float("nan"))

    with pytest.raises(DataError, match="sample 9 "):
        validate([ReconstructionFID(Broken())], Diverged())


def _ranks(rank, world, padded, val, batch_size):
    callbacks = [ReconstructionFID(TinyFeatures()), ReconstructionQuality()]
    data = TinyData(val=val, batch_size=batch_size, padded=padded)
    validate(callbacks, data=data)
    return {figure.label: figure.value for callback in callbacks for figure in callback.figures}


@pytest.mark.parametrize(("world", "padded", "batch_size"), [(2, False, 4), (2, True, 4), (3, True, 8)])
def test_processes_equal_one_and_repeats_are_dropped(world, padded, batch_size):
    single = _ranks(0, 1, False, 23, 8)
    for answer in run_forked(_ranks, padded, 23, batch_size, world=world):
        assert answer == pytest.approx(single, rel=1e-6)  # equal labels, so N counts each sample once
