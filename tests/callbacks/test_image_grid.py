import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from PIL import Image

from figure_setup import TinyData, TinyStage, validate
from forked import run_forked
from tessera.callbacks import ImageGrid
from tessera.data import tile
from tessera.errors import ConfigError


def test_grids_are_the_same_every_time_and_reach_the_logger(tmp_path):
    contents = []
    for run in range(2):
        callback = ImageGrid(num_images=11, samples_per_class=2, folder=tmp_path / str(run))
        logger = TensorBoardLogger(tmp_path / f"tb{run}")
        validate([callback], data=TinyData(batch_size=4 + run), logger=logger)
        names = [path.name for path in callback.paths]
        assert names == ["val_reconstruction_step00000000.png", "val_samples_step00000000.png"]
        contents.append([path.read_bytes() for path in callback.paths])
        logger.experiment.flush()
        assert any(b"val/reconstruction" in path.read_bytes() for path in (tmp_path / f"tb{run}").rglob("events*"))
    assert contents[0] == contents[1]
    with Image.open(callback.paths[0]) as file:
        # 11 columns of 18 pixels, three rows
        assert file.size == tuple(side * (512 // 200) for side in (11 * 18 + 2, 3 * 18 + 2))


def test_rows_show_inputs_reconstructions_and_perturbed(tmp_path):
    stage, data = TinyStage(generator=False), TinyData()
    callback = ImageGrid(num_images=3, alpha=0.0, folder=tmp_path)
    validate([callback], stage, data, logger=CSVLogger(tmp_path))
    assert len(callback.paths) == 1
    recon = stage.tokenizer.reconstruct(data.val.images[:3]).detach()
    expected = tile(torch.cat([data.val.images[:3], recon]), 3)
    with Image.open(callback.paths[0]) as file:
        scale = file.size[0] // expected.shape[2]
        small = file.resize((expected.shape[2], expected.shape[1]), Image.NEAREST)
        assert scale >= 1
    shown = (
        torch.frombuffer(bytearray(small.tobytes()), dtype=torch.uint8).view(*expected.shape[1:], 3).permute(2, 0, 1)
    )
    assert (shown.int() - expected.int()).abs().max() <= 1
    callback = ImageGrid(num_images=3, alpha=1.0, delta=16, folder=tmp_path / "perturbed")
    validate([callback], stage, data)
    perturbed = callback.rows[0][2]
    assert callback.rows[0].shape == (3, 3, 3, 16, 16) and (perturbed - recon).abs().max() > 0.01


@pytest.mark.parametrize(
    "options",
    [{"num_images": 0}, {"alpha": 1.5}, {"delta": 0}, {"samples_per_class": -1}, {"num_classes": 0}],
)
def test_bad_settings(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        ImageGrid(**options)


def _ranks(rank, world, folder):
    callback = ImageGrid(num_images=4, folder=folder)
    validate([callback], data=TinyData(batch_size=4))
    return [path.name for path in callback.paths]


def test_one_process_draws(tmp_path):
    first, second = run_forked(_ranks, tmp_path)
    assert len(first) == 2 and second == []
