"""One thread and a fixed seed per test: small models are slower with more threads when cores are shared."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")

import pytest
import torch


@pytest.fixture(autouse=True)
def _seeded_single_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield


@pytest.fixture
def shipped_files(monkeypatch):
    """Golden files of this repository whatever TESSERA_GOLDEN_DIR says: for tests of comparisons and of refusals."""
    monkeypatch.delenv("TESSERA_GOLDEN_DIR", raising=False)


def pytest_collection_modifyitems(items):
    """GPU tests are skipped, with the reason shown, where there is no GPU."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
