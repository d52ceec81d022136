"""VAR's published multi-scale tokenizer: parity, other scale lists, strictness."""

import pytest
import torch
from torch import Tensor

from golden_cases import Golden, assert_outputs, golden
from tessera.errors import CheckpointError, ConfigError
from tessera.tokenizers import Tokenizer
from tessera.zoo import from_public

CASE = "var_p1_vqvae"


def outputs(model: Tokenizer, file: Golden) -> dict[str, Tensor]:
    """Every recorded output, ours."""
    branch, grids = model.quantizer.branches[0], model.quantizer.grids
    with torch.no_grad():
        f = model.encode(file.input["image"])
        tokens = model.tokenize(file.input["image"])[:, 0]
        ours = {
            "f": f,
            "var_input": branch.next_scale_input(tokens),
            "rec": model.detokenize(tokens[:, None]),
        }
        latent, start = torch.zeros_like(f), 0
        for scale, (height, width) in enumerate(grids):
            part = tokens[:, start : start + height * width]
            start += height * width
            ours[f"idx_{scale}"] = part
            ours[f"f_hat_{scale}"] = branch.partial_decode(tokens, scale + 1)
            latent, following = branch.advance(latent, branch.embed(part, scale), scale)
            if following is None:
                ours[f"next_map_{scale}"] = latent
            else:
                ours[f"next_map_{scale}"] = following.transpose(1, 2).unflatten(2, grids[scale + 1])
    return ours


@pytest.mark.golden
@pytest.mark.parametrize("case", [CASE])
def test_published_tokenizer(case):
    file = golden(case)
    assert_outputs(outputs(from_public("var", file.config, file.weights), file), file)


@pytest.mark.usefixtures("shipped_files")
@pytest.mark.parametrize("case", [CASE])
def test_parity_fails_when_a_weight_of_any_part_changes(case):
    file = golden(case)
    tested = (".conv1.weight", "_conv.weight", "conv_in.weight", "conv_out.weight", "proj_out.weight", "qkv.weight")
    keys = [key for key in file.weights if key.endswith(tested) or "quant_resi" in key or "embedding" in key]
    used = set(from_public("var", file.config, file.weights).quantizer.branches[0].phi.table)
    for key in keys:
        if "qresi_ls" in key and int(key.split(".")[3]) not in used:
            continue
        state = {**file.weights, key: -1.5 * file.weights[key]}
        with pytest.raises(AssertionError):
            assert_outputs(outputs(from_public("var", file.config, state), file), file)


@pytest.mark.usefixtures("shipped_files")
@pytest.mark.parametrize("case", [CASE])
def test_the_same_weights_serve_other_scales(case):
    file = golden(case)
    down = 2 ** (len(file.config["ch_mult"]) - 1)
    # as many scales, because the convolutions may be one per scale
    grids = [1 + min(scale, 2) for scale in range(len(file.config["v_patch_nums"]))]
    model = from_public("var", {**file.config, "v_patch_nums": grids}, file.weights)
    assert model.resolution == grids[-1] * down
    assert model.quantizer.num_tokens == sum(side**2 for side in grids)
    with pytest.raises(ConfigError, match="only square images"):
        from_public("var", {**file.config, "v_patch_nums": [1, [2, 3]]}, file.weights)


@pytest.mark.usefixtures("shipped_files")
@pytest.mark.parametrize("case", [CASE])
def test_loading_is_strict(case):
    file, state = golden(case), dict(golden(case).weights)
    state["stray"] = state.pop("decoder.mid.block_2.conv1.bias")
    with pytest.raises(CheckpointError) as error:
        from_public("var", file.config, state)
    assert "missing decoder.mid.2.conv1.bias" in str(error.value) and "unexpected stray" in str(error.value)
    with pytest.raises(ConfigError, match="lacks vocab_size"):
        from_public("var", {"z_channels": 4, "ch": 8, "v_patch_nums": [1]}, {})
