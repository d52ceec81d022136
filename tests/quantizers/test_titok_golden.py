"""TiTok's quantizer: plain, normalised and clustering codebooks."""

from functools import partial

import pytest
import torch

from golden_cases import Golden, assert_close, golden
from tessera.quantizers import ClusteringRevival, ProductQuantizer, SingleGridQuantizer, VQCodebook

CASES = ["titok_quantizer"]


def build(file: Golden, kind: str, **options) -> ProductQuantizer:
    codebook = partial(VQCodebook, codebook_size=file.config["codebook_size"], **options)
    branch = partial(SingleGridQuantizer, codebook=codebook, grid=(1, file.config["n"]))
    quantizer = ProductQuantizer(branch, branches=1, dim=file.config["token_size"])
    state = {"branches.0.codebooks.0.embedding": file.weights[f"{kind}.embedding.weight"]}
    if f"{kind}.embed_prob" in file.weights:
        state["branches.0.codebooks.0.revival.usage"] = file.weights[f"{kind}.embed_prob"]
    quantizer.load_state_dict(state)
    return quantizer


@pytest.mark.golden
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", ["l2", "plain"])
def test_published_quantizer(case, kind):
    file = golden(case)
    expected = {name.split("/")[1]: value for name, value in file.output.items() if name.startswith(f"{kind}/")}
    quantizer = build(file, kind, l2_normalize=kind == "l2")
    codebook = quantizer.branches[0].codebooks[0]
    z = file.input["z"].clone().requires_grad_()
    out = quantizer(z)
    assert torch.equal(out.tokens, expected["indices"])
    assert_close(out.z_q, expected["z_quantized"])
    commitment = file.config["commitment_cost"] * out.losses["commitment"]
    loss = out.losses["codebook"] + commitment
    assert_close(out.losses["codebook"], expected["codebook_loss"])
    assert_close(commitment, expected["commitment_loss"])
    assert_close(loss, expected["quantizer_loss"])
    total = loss + (out.z_q * file.input["upstream"]).sum()
    grads = torch.autograd.grad(total, (z, codebook.embedding))
    assert_close(grads[0], expected["grad_z"], rtol=1e-4)
    assert_close(grads[1], expected["grad_codebook"], rtol=1e-4)
    assert_close(codebook.mix(file.input["soft_index"]), expected["soft_lookup"])


@pytest.mark.golden
@pytest.mark.parametrize("case", CASES)
def test_published_clustering(case):
    file = golden(case)
    quantizer = build(file, "cluster", l2_normalize=False, revival=ClusteringRevival).train()
    codebook = quantizer.branches[0].codebooks[0]
    calls = sum(name.startswith("cluster/indices_") for name in file.output)
    assert calls > 0
    for call in range(calls):
        with torch.no_grad():
            out = quantizer(file.input[f"z{call + 1}" if call else "z"])
        assert torch.equal(out.tokens, file.output[f"cluster/indices_{call}"])
        assert_close(codebook.revival.usage, file.output[f"cluster/embed_prob_{call}"])
        assert_close(codebook.embedding, file.output[f"cluster/codebook_after_{call}"], atol=2e-5)
