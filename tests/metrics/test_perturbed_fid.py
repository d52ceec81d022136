import pytest

from forked import run_forked
from tessera import zoo
from tessera.data import DigitsImages
from tessera.metrics import DigitsFeatures, measure_perturbed
from tessera.perturbation import PerturbationGrid


def measured(rank=0, world=1, batch_size=50):
    grid = PerturbationGrid(alphas=(0.7,))
    tokenizer = zoo.load("tessera/digits_tokenizer")
    figure = measure_perturbed(tokenizer, DigitsImages("val"), DigitsFeatures(), grid, batch_size)
    return figure.label, figure.value


def test_gives_what_training_measured():
    """The shipped tokenizer's card has the figures of its last validation."""
    tokenizer = zoo.load("tessera/digits_tokenizer")
    figure = measure_perturbed(tokenizer, DigitsImages("val"), DigitsFeatures())
    (recorded,) = [found for found in tokenizer.card.figures if found["name"] == "pFID"]
    assert figure.label == recorded["label"]
    assert figure.value == pytest.approx(recorded["value"], rel=1e-3)
    assert figure.details["control_rfid"] == pytest.approx(recorded["details"]["control_rfid"], rel=1e-3)


def test_batches_and_processes_do_not_matter():
    label, value = measured()
    assert label.startswith("pFID[digits-cnn]@N=359,K=256,alpha={0.7}")
    assert measured(batch_size=400) == (label, pytest.approx(value, rel=1e-5))
    assert run_forked(measured) == [(label, pytest.approx(value, rel=1e-5))] * 2
