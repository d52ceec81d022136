"""Every golden file with a tokenizer or a generator in it, through `zoo.from_public`, family and options as they stand.

What the models compute is compared by the tests of their families; here: that the files alone build them.
"""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from golden_cases import DEFAULT_FOLDER, Golden, golden
from tessera import zoo
from tessera.backbones import merge
from tessera.errors import CheckpointError

# keys of whole models; files of blocks, quantizers and judges have none of them
INSIDE = ("vq_model.", "var_wo_ddp.", "vae_local.")
MARKS = ("encoder.", "decoder.", "lm_head.", "head.weight", "model.embeddings.", *INSIDE)
# one tokenizer in two files
OTHER_HALF = {
    "ibq_tokenizer_enc": "ibq_tokenizer_dec",
    "ibq_tokenizer_dec": "ibq_tokenizer_enc",
    "maskgit_vqgan_encode": "maskgit_vqgan_decode",
    "maskgit_vqgan_decode": "maskgit_vqgan_encode",
    "var_pq2_tokenize": "var_pq2_sample",
}


def holds_a_model(path: Path) -> bool:
    with safe_open(path, framework="pt") as file:
        return any(key.removeprefix("weights/").startswith(MARKS) for key in file.keys())  # noqa: SIM118


STEMS = [path.stem for path in sorted(DEFAULT_FOLDER.glob("*.safetensors")) if holds_a_model(path)]
pytestmark = pytest.mark.golden


def whole(stem: str) -> tuple[Golden, dict[str, Tensor]]:
    """A file, and the weights of the model in it."""
    file = golden(stem)
    if stem not in OTHER_HALF or golden(OTHER_HALF[stem]).config != file.config:
        return file, file.weights
    # the file with the decoder of VAR's tokenizer has a generator besides
    other = {key: v for key, v in golden(OTHER_HALF[stem]).weights.items() if not key.startswith("var_wo_ddp.")}
    return file, {**other, **file.weights}


def built(stem: str) -> nn.Module:
    file, weights = whole(stem)
    return zoo.from_public(file.metadata["family"], file.config, weights)


def values(state: dict[str, Tensor]) -> Tensor:
    return torch.cat([value.double().flatten() for value in state.values()])


def test_the_files_are_there():
    assert len(STEMS) >= 30


@pytest.mark.parametrize("stem", STEMS)
def test_built_from_the_file_alone(stem, tmp_path):
    file, weights = whole(stem)
    model = zoo.from_public(file.metadata["family"], file.config, weights)
    assert not model.training
    assert torch.isin(values(model.state_dict()), values(weights)).all(), "every weight is one of the file"
    plain = merge(model).state_dict()
    again = zoo.from_pretrained(zoo.export(model, tmp_path)).state_dict()
    assert again.keys() == plain.keys()
    assert all(torch.equal(again[key], value) for key, value in plain.items())


@pytest.mark.parametrize("stem", STEMS)
def test_built_without_values(stem):
    """Meta tensors give a meta module of the same keys and shapes."""
    file, weights = whole(stem)
    shapes = {key: torch.empty_like(value, device="meta") for key, value in weights.items()}
    model = zoo.from_public(file.metadata["family"], file.config, shapes)
    assert all(value.is_meta for value in model.parameters())
    assert {k: v.shape for k, v in model.state_dict().items()} == {
        k: v.shape for k, v in built(stem).state_dict().items()
    }


@pytest.mark.parametrize("stem", STEMS)
def test_loaded_strictly(stem):
    file, weights = whole(stem)
    mark = next((part for part in INSIDE if any(key.startswith(part) for key in weights)), "")
    with pytest.raises(CheckpointError, match=r"unexpected \S*stray"):
        zoo.from_public(file.metadata["family"], file.config, {**weights, f"{mark}stray": torch.zeros(1)})
