import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger

from figure_setup import TinyData, TinyStage, validate
from forked import run_forked
from tessera.callbacks import CodebookReport
from tessera.metrics.codebook import perplexity


def test_figures_are_of_the_whole_set(tmp_path):
    stage, data = TinyStage(branches=2), TinyData()
    callback = CodebookReport()
    logger = TensorBoardLogger(tmp_path)
    trainer = validate([callback], stage, data, logger=logger)
    tokens = stage.tokenizer.tokenize(data.val.images)
    values = {figure.name: figure.value for figure in callback.figures}
    for branch in range(2):
        counts = torch.bincount(tokens[:, branch].flatten(), minlength=16)
        assert values[f"usage_branch{branch}"] == pytest.approx(float((counts > 0).double().mean()))
        assert values[f"perplexity_branch{branch}"] == pytest.approx(float(perplexity(counts)))
        assert values[f"dead_codes_branch{branch}"] == float((counts == 0).sum())
        assert f"val/codebook/usage_branch{branch}" in trainer.callback_metrics
    assert callback.figures[0].protocol.extra["tokens"] == 23 * 16 * 2
    assert callback.figures[0].label == "usage_branch0@N=23"
    logger.experiment.flush()
    assert any(b"val/codebook/counts_branch1" in path.read_bytes() for path in tmp_path.rglob("events*"))


def _ranks(rank, world, padded):
    callback = CodebookReport()
    validate([callback], data=TinyData(batch_size=4, padded=padded))
    return {figure.label: figure.value for figure in callback.figures}


@pytest.mark.parametrize("padded", [False, True])
def test_two_processes_equal_one(padded):
    single = _ranks(0, 1, False)
    for answer in run_forked(_ranks, padded):
        assert answer == pytest.approx(single)
