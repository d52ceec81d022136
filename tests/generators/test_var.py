"""VAR: its parts, its loss, its sampler against the plain loop; what the tests common to all generators don't cover."""

import copy
import functools
import itertools
import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend

from generators.var_reference import STRUCTURES, plain_generate, small_batch, small_quantizer, small_var
from tessera.errors import ConfigError
from tessera.generators import VAR, SamplingConfig
from tessera.generators.sampling import make_draw
from tessera.generators.var_decoder import VARDecoder, gumbel_draw
from tessera.generators.var_layers import ScaleAttention, scale_causal_attention
from tessera.quantizers import ProductQuantizer, SingleGridQuantizer
from tessera.rng import IndexedRng

LABELS = torch.tensor([0, 1, 2, 3, 1])
RAMP = SamplingConfig(guidance_scale=2.5, guidance_schedule="ramp", top_k=7, top_p=0.9)
COMBINATIONS = pytest.mark.parametrize(
    ("structure", "branches"), [(s, p) for s in STRUCTURES if s != "many_scales" for p in (1, 2)]
)


def rng(count: int = len(LABELS), **options) -> IndexedRng:
    return IndexedRng(0, torch.arange(count), **options)


# ---- parts


@pytest.mark.parametrize("sizes", [[1, 4, 9], [1, 1, 4, 4], [3, 2], [7]])
def test_attention_by_scales_equals_masked_attention(sizes):
    q, k, v = torch.randn(3, 2, 2, sum(sizes), 4, dtype=torch.float64).requires_grad_()
    levels = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    mask = levels[:, None] >= levels
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.7)
    torch.testing.assert_close(scale_causal_attention(q, k, v, sizes, 0.7), expected)


def test_scale_of_normalised_attention_is_clamped():
    layer = ScaleAttention(8, 2, [2, 3], normalized=True)
    with torch.no_grad():
        layer.scale_mul_1H11.copy_(torch.tensor([5.0, 1.0]).view(1, 2, 1, 1))
    torch.testing.assert_close(layer.constants().query_scale.flatten(), torch.tensor([100.0, math.e]))


def test_initialisation():
    """Standard deviations of the published initialisation; what is drawn and what is 0."""
    torch.manual_seed(0)
    width, depth = 96, 3
    sizes = VAR.sizes(small_quantizer(branches=2), 40)
    model = VAR(**sizes, depth=depth, hidden_size=width, num_heads=3, init_gate=0.01, init_modulation=0.5)
    std = (1 / (3 * width)) ** 0.5
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif name.endswith("scale_mul_1H11"):
            torch.testing.assert_close(parameter, torch.full_like(parameter, math.log(4)))
        elif name.startswith("blocks") and "ada_lin" in name:
            gates, others = parameter.split([2 * width, 4 * width])
            assert gates.std().item() == pytest.approx(0.01 * std, rel=0.1), name
            assert others.std().item() == pytest.approx(0.5 * std, rel=0.1), name
        else:
            factor = {"head.weight": 0.02, "head_nm.ada_lin.1.weight": 0.5}.get(name, 1)
            if name.endswith(("attn.proj.weight", "fc2.weight")):
                factor = (2 * depth) ** -0.5
            assert parameter.std().item() == pytest.approx(factor * std, rel=0.25), name


def test_initialisation_of_shared_modulation():
    torch.manual_seed(0)
    width = 96
    sizes = {**VAR.sizes(small_quantizer(), 4), "depth": 2, "hidden_size": width, "num_heads": 3}
    model = VAR(**sizes, shared_modulation=True, init_gate=0.01, init_modulation=0.5, init_std=0.3)
    offsets = torch.cat([block.ada_gss[0, 0] for block in model.blocks], 1)
    expected = [0.01 * width**-0.5] * 2 + [0.5 * width**-0.5] * 4
    assert offsets.std(1).tolist() == pytest.approx(expected, rel=0.3)
    assert model.shared_ada_lin[1].weight.std().item() == pytest.approx(0.3, rel=0.1)
    assert model.pos_1LC.std().item() == pytest.approx((1 / (3 * width)) ** 0.5, rel=0.1)  # whatever init_std is
    assert not any("ada_lin" in name for name in model.state_dict() if name.startswith("blocks"))


def test_sizes_follow_from_the_depth_unless_given():
    with torch.device("meta"):
        model = VAR(11, [1, 2], 4, 3, depth=6)
        other = VAR(11, [1, 2], 4, 3, depth=6, hidden_size=40, num_heads=5, mlp_size=50, drop_path=0.3)
    assert (model.hidden_size, model.num_heads, model.drop_path) == (384, 6, pytest.approx(0.025))
    assert model.blocks[0].ffn.fc1.weight.shape == (4 * 384, 384)
    assert (other.hidden_size, other.num_heads, other.drop_path) == (40, 5, 0.3)
    assert other.blocks[0].ffn.fc1.weight.shape == (50, 40)


# ---- training


@COMBINATIONS
def test_a_scale_sees_all_branches_of_earlier_scales_only(structure, branches):
    model = small_var(structure, branches)
    tokens, labels = small_batch(model)
    ends = torch.tensor(model.scale_sizes).cumsum(0).tolist()
    with torch.no_grad():
        before = model(tokens, labels)
        for branch in range(branches):
            for scale, end in enumerate(ends):
                changed = tokens.clone()
                changed[:, branch, end - 1] = (changed[:, branch, end - 1] + 1) % model.codebook_size
                difference = (model(changed, labels) - before).abs().amax((0, 1, 3))
                assert not difference[:end].any()
                assert (difference[end:] > 1e-6).all() or scale == len(ends) - 1


def test_dropped_labels_and_smoothing_in_training_only():
    model = small_var(class_dropout=1.0, label_smoothing=0.2)
    tokens, labels = small_batch(model)
    nobody = torch.full_like(labels, model.num_classes)
    torch.testing.assert_close(model.loss(tokens, labels), model.teacher_forced_loss(tokens, labels))
    model.train()
    expected = model.teacher_forced_loss(tokens, nobody, label_smoothing=0.2)
    torch.testing.assert_close(model.loss(tokens, labels, rng=rng(4)), expected)
    logits = model(tokens, nobody).flatten(0, 2)
    torch.testing.assert_close(expected["loss"], F.cross_entropy(logits, tokens.flatten(), label_smoothing=0.2))


def test_stochastic_depth():
    """Each branch of a block vanishes for a share of the samples that rises over the blocks, and is scaled up else."""
    model = small_var(depth=4, drop_path=0.6, class_dropout=0.0).train()
    tokens, labels = small_batch(model, 400)
    factors = []
    model.teacher_forced_loss = lambda tokens, conditions, survival, smoothing: factors.append(survival)
    model.loss(tokens, labels, rng=rng(400))
    rates = torch.tensor([0.0, 0.2, 0.4, 0.6])
    assert factors[0].shape == (400, 4, 2)
    torch.testing.assert_close((factors[0] == 0).float().mean((0, 2)), rates, atol=0.06, rtol=0)
    kept = factors[0].amax(0)
    torch.testing.assert_close(kept, (1 / (1 - rates))[:, None].expand(4, 2))
    assert not torch.equal(factors[0][..., 0], factors[0][..., 1])

    block, x, condition = model.blocks[0], torch.randn(1, model.num_tokens, 16), torch.randn(1, 16)
    survivals = [(0.0, 0.0), (1.0, 1.0), (2.0, 1.0), (1.0, 0.0), (0.0, 1.0)]
    outputs = [block(x, condition, torch.tensor([survival])) for survival in survivals]
    assert torch.equal(outputs[0], x)
    torch.testing.assert_close(outputs[1], block(x, condition))
    assert not any(torch.allclose(one, other) for one, other in itertools.combinations(outputs, 2))


def test_the_residual_stream_stays_in_float32_under_autocast():
    model = small_var(branches=2)
    tokens, labels = small_batch(model)
    seen = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, args, out: seen.extend([args[0].dtype, out.dtype]))
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.loss(tokens, labels)["loss"]
    assert set(seen) == {torch.float32}
    torch.testing.assert_close(loss, model.loss(tokens, labels)["loss"], atol=0.1, rtol=0.05)


# ---- the quantizer


def test_a_copy_shares_the_quantizer():
    model = small_var()
    assert copy.deepcopy(model).quantizer is model.quantizer


def test_the_quantizer_is_kept_beside_the_model():
    model = small_var()
    assert not any("quantizer" in name or "codebook" in name for name in model.state_dict())
    assert {id(p) for p in model.quantizer.parameters()}.isdisjoint(id(p) for p in model.parameters())
    quantizer = model.quantizer
    model.to(torch.bfloat16)
    assert model.quantizer is quantizer
    assert all(parameter.dtype == torch.float32 for parameter in quantizer.parameters())
    assert all(parameter.requires_grad for parameter in quantizer.branches[0].codebooks.parameters())
    twin = copy.deepcopy(model)
    assert torch.equal(twin.generate(LABELS, RAMP, rng=rng()), model.generate(LABELS, RAMP, rng=rng()))


def test_without_a_quantizer_nothing_is_read():
    model = VAR(**VAR.sizes(small_quantizer(), 4), depth=1, hidden_size=8, num_heads=1)
    tokens, labels = small_batch(model)
    for call in (lambda: model.loss(tokens, labels), lambda: model.generate(labels, RAMP)):
        with pytest.raises(ConfigError, match=r"call generator.bind\(tokenizer.quantizer\)"):
            call()


def test_a_single_grid_is_refused():
    quantizer = ProductQuantizer(
        lambda dim: SingleGridQuantizer(dim, STRUCTURES["residual"].keywords["codebook"], 3), 1, 4
    )
    with pytest.raises(ConfigError, match=r"VAR predicts scale by scale.*single grid \(3, 3\).*quantizer=multiscale"):
        VAR.sizes(quantizer, 4)


@COMBINATIONS
def test_sizes_survive_a_file(structure, branches):
    """They go into checkpoints and exports, where pairs become lists."""
    quantizer = small_quantizer(structure, branches)
    sizes = json.loads(json.dumps(VAR.sizes(quantizer, 4)))
    VAR(**sizes, depth=1, hidden_size=8, num_heads=1).bind(quantizer)


# ---- sampling


@COMBINATIONS
@pytest.mark.parametrize("options", [{}, {"shared_modulation": True}, {"normalized_attention": False}])
def test_cached_equals_plain(structure, branches, options):
    """Token for token, with guidance and settings that change over scales, and with given tokens."""
    model = small_var(structure, branches, **options)
    sampling = SamplingConfig(1.2, guidance_scale=2.5, guidance_schedule="ramp", top_p=0.95, temperature_end=0.8)
    for settings in (sampling, SamplingConfig(temperature=0.9)):
        draw = make_draw(rng(), len(LABELS), torch.device("cpu"))
        tokens = model.generate(LABELS, settings, rng=rng())
        assert torch.equal(tokens, plain_generate(model, LABELS, settings, draw))
    teacher, _ = small_batch(model, len(LABELS), seed=1)
    keep = torch.rand(teacher.shape, generator=torch.Generator().manual_seed(2)) < 0.4
    kept = model.generate(LABELS, sampling, rng=rng(), teacher=teacher, keep=keep)
    draw = make_draw(rng(), len(LABELS), torch.device("cpu"))
    assert torch.equal(kept, plain_generate(model, LABELS, sampling, draw, teacher, keep))


@COMBINATIONS
def test_the_latent_is_that_of_the_tokens(structure, branches):
    model = small_var(structure, branches)
    tokens, latent = model.generate_latent(LABELS, RAMP, rng=rng())
    assert torch.equal(tokens, model.generate(LABELS, RAMP, rng=rng()))
    with torch.no_grad():
        torch.testing.assert_close(latent, model.quantizer.decode(tokens))


@COMBINATIONS
def test_smooth_latents(structure, branches):
    """Mixtures of codes are sharp at the last scales and where tokens are given."""
    model = small_var(structure, branches)
    tokens, latent = model.generate_latent(LABELS, RAMP, rng=rng(), smooth=True)
    again, same = model.generate_latent(LABELS, RAMP, rng=rng(), smooth=gumbel_draw(rng(), 5, latent.device))
    assert torch.equal(tokens, again) and torch.equal(latent, same)
    with torch.no_grad():
        decoded = model.quantizer.decode(tokens)
        assert (latent - decoded).abs().max() > 1e-3
        first = slice(0, model.scale_sizes[0])
        assert torch.equal(tokens[:, :, first], model.generate(LABELS, RAMP, rng=rng())[:, :, first])
        everywhere = torch.ones_like(tokens).bool()
        tokens, latent = model.generate_latent(LABELS, RAMP, rng=rng(), smooth=True, teacher=tokens, keep=everywhere)
        torch.testing.assert_close(latent, decoded)


def test_smooth_needs_noise():
    with pytest.raises(ConfigError, match="smooth=True needs a source of noise"):
        small_var().generate_latent(LABELS, RAMP, rng=lambda probs, scale: probs.argmax(-1), smooth=True)


def test_what_does_not_depend_on_tokens_is_computed_once():
    """The modulation runs once, for distinct classes; the head on one row per sample; no half more than needed."""
    model = small_var()
    rows: dict[str, list[int]] = {"ada_lin": [], "fc1": [], "head": []}
    model.blocks[1].ada_lin.register_forward_hook(lambda _, args, out: rows["ada_lin"].append(len(args[0])))
    model.blocks[1].ffn.fc1.register_forward_hook(lambda _, args, out: rows["fc1"].append(len(args[0])))
    model.head.register_forward_hook(lambda _, args, out: rows["head"].append(len(args[0])))
    scales = len(model.grids)
    model.generate(LABELS, RAMP, rng=rng())
    assert rows == {"ada_lin": [5], "fc1": [10] * scales, "head": [5] * scales}  # four classes and none
    for values in rows.values():
        values.clear()
    model.generate(LABELS, SamplingConfig(guidance_scale=1.0), rng=rng())
    assert rows == {"ada_lin": [4], "fc1": [5] * scales, "head": [5] * scales}


def test_the_first_scale_is_not_guided_by_the_ramp():
    model = small_var()
    seen: dict[float | None, list[torch.Tensor]] = {None: [], 9.0: []}
    for scale, probs in seen.items():
        settings = SamplingConfig(guidance_scale=scale, guidance_schedule="ramp")

        def draw(p, step, probs=probs):
            probs.append(p)
            return torch.zeros(p.shape[:-1], dtype=torch.int64)

        model.generate(LABELS, settings, rng=draw)
    torch.testing.assert_close(seen[9.0][0], seen[None][0])
    assert (seen[9.0][1] - seen[None][1]).abs().max() > 1e-3


@pytest.mark.parametrize("how", ["module", "autocast"])
def test_the_cache_has_the_type_of_the_products(how):
    model = small_var()
    if how == "module":
        model = model.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"), torch.no_grad():
        assert VARDecoder(model, LABELS).cache.keys.dtype == torch.bfloat16


@pytest.fixture
def compiling(monkeypatch):
    """Traced steps, and how often they were traced."""
    counts = CompileCounterWithBackend("eager")
    compile_step = functools.cache(lambda function, mode: torch.compile(function, backend=counts, fullgraph=True))
    monkeypatch.setattr("tessera.generators.compilation._compile", compile_step)
    torch._dynamo.reset()
    yield counts
    torch._dynamo.reset()


def test_compiled_scales(compiling):
    """The same tokens, from code that isn't compiled again for other labels and draws, nor for every scale."""
    model = small_var("many_scales", branches=2)
    expected = [model.generate(labels, RAMP, rng=rng(step=1)) for labels in (LABELS, LABELS.flip(0))]
    model.compile_sampling()
    state = set(model.state_dict())
    assert torch.equal(model.generate(LABELS, RAMP, rng=rng(step=1)), expected[0])
    compilations = compiling.frame_count
    assert 1 <= compilations <= 5  # places 0 and 1, and scales of one token, are cases of their own
    assert torch.equal(model.generate(LABELS.flip(0), RAMP, rng=rng(step=1)), expected[1])
    assert compiling.frame_count == compilations
    assert set(model.state_dict()) == state


# ---- bad input


@pytest.mark.parametrize(
    ("setting", "key"),
    [
        ({"grids": [(2, 2)]}, "grids"),
        ({"grids": [1, 0]}, "grids"),
        ({"latent_channels": 0}, "latent_channels"),
        ({"depth": 0}, "depth"),
        ({"hidden_size": 15}, "num_heads"),
        ({"num_heads": 0}, "num_heads"),
        ({"mlp_size": 0}, "mlp_size"),
        ({"class_dropout": 1.5}, "class_dropout"),
        ({"drop_path": 1.0}, "drop_path"),
        ({"label_smoothing": -0.1}, "label_smoothing"),
        ({"init_std": -1.0}, "init_std"),
        ({"init_gate": -1.0}, "init_gate"),
        ({"init_head": -1.0}, "init_head"),
        ({"num_classes": 0}, "num_classes"),
    ],
)
def test_bad_option_is_refused_by_its_key(setting, key):
    options = {"codebook_size": 11, "grids": [1, 2], "latent_channels": 4, "num_classes": 3}
    with pytest.raises(ConfigError, match=f"generator.{key}="):
        VAR(**options | {"depth": 1, "hidden_size": 16, "num_heads": 2} | setting)
