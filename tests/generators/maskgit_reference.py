"""What the tests of MaskGIT share: tiny models, published settings, and draws from recorded uniforms."""

from typing import Any

from torch import Tensor

from golden_cases import Golden
from tessera.generators import MaskGITSampling, MaskGITUViT, MaskGITViT
from tessera.generators.maskgit import MaskGIT
from tessera.zoo import from_public

SMALL = {"codebook_size": 11, "num_tokens": 6, "num_classes": 4, "hidden_size": 16, "num_heads": 2, "mlp_size": 24}


def small_maskgit(kind: type[MaskGIT], **changes: Any) -> MaskGIT:
    """Tiny model in eval mode."""
    return kind(**{**SMALL, "depth": 2 if kind is MaskGITViT else 3, **changes}).eval()


KINDS = [MaskGITViT, MaskGITUViT]


def golden_maskgit(data: Golden) -> MaskGIT:
    return from_public("maskgit", data.config, data.weights)


def public_sampling(options: dict[str, Any]) -> MaskGITSampling:
    """Our settings for those of the public `generate`.

    Its guidance adds scale x difference to the conditional logits, which is a weight of 1 + scale, except with
    power-cosine.
    """
    scale, decay = options["guidance_scale"], options["guidance_decay"]
    annealed = options["softmax_temperature_annealing"]
    return MaskGITSampling(
        num_steps=options["num_sample_steps"],
        gumbel_temperature=options["randomize_temperature"],
        temperature=1.3 if annealed else 1.0,
        temperature_end=0.5 if annealed else None,
        guidance_scale=scale if decay == "power-cosine" else 1 + scale,
        guidance_schedule=decay.replace("-", "_"),
        guidance_power=options.get("guidance_scale_pow", 3.0) if decay == "power-cosine" else 0.0,
    )


class RecordedUniforms:
    """A `SampleRng` whose draws are given: streams "<name>/<step>" are rows of tensors (T, B, ...).

    The recorded shapes lack the axis of branches, of which published models have one.
    """

    def __init__(self, **streams: Tensor):
        self.streams = streams

    def uniform(self, stream: str, *shape: int) -> Tensor:
        name, step = stream.split("/")
        recorded = self.streams[name][int(step)]
        return recorded.view(len(recorded), *shape)
