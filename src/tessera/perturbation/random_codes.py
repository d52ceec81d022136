"""Perturbation by any code: the control of strategies that choose near ones."""

from torch import Tensor, int64, zeros_like

from tessera.perturbation.codes import CodePerturbation
from tessera.quantizers.product import ProductQuantizer
from tessera.quantizers.structure import ScaleTokens
from tessera.rng import SampleRng, integers

_BITS = 24  # of one uniform draw


def uniform_codes(draws: SampleRng, stream: str, codebook_size: int, *shape: int) -> Tensor:
    """Uniform codes (B, *shape) int64 in [0, codebook_size), of codebooks of any size.

    One float32 draw tells 2^24 codes apart; more codes take up to three draws each, whose remainder is taken: of sizes
    that are no powers of two, some codes are then likelier than others by less than codebook_size / 2^62.
    """
    if codebook_size <= 1 << _BITS:
        return integers(draws.uniform(stream, *shape), codebook_size)
    uniform = draws.uniform(stream, *shape, 3)
    bits = zeros_like(uniform[..., 0], dtype=int64)
    for part, width in zip(uniform.unbind(-1), (_BITS, _BITS, 62 - 2 * _BITS), strict=True):
        bits = (bits << width) | integers(part, 1 << width)
    return bits % codebook_size


class RandomCodePerturbation(CodePerturbation):
    """Re-draws a share alpha of the tokens of a share beta of the images uniformly among all K codes.

    Of the re-drawn tokens, 1/K keep their value. As an error it is far larger than a generator's, which mostly confuses
    near codes: the control that shows what nearness contributes.

    Args:
        alpha, beta, schedule, beta_schedule: see `Perturbation`.
        loop, scale_weights, joint: see `CodePerturbation`.

    Raises:
        ConfigError: see `CodePerturbation`.
    """

    def draw_choice(
        self, draws: SampleRng, quantizer: ProductQuantizer, tokens: Tensor, strength: dict[str, float]
    ) -> Tensor:
        """The new codes themselves."""
        return uniform_codes(draws, "perturb/code", quantizer.codebook_size, *tokens.shape[1:])

    def codes(
        self, quantizer: ProductQuantizer, z: Tensor, tokens: Tensor, choice: Tensor, strength: dict[str, float]
    ) -> Tensor:
        return choice

    def scale_codes(self, scale: ScaleTokens, choice: Tensor, strength: dict[str, float]) -> Tensor:
        return choice
