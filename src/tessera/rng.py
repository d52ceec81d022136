"""Random draws that belong to samples, not to processes.

A draw is a pure function of (seed, step, sample index, stream, site), computed by a counter-based hash. The same
sample therefore gets the same draws whatever the batch size, the number of processes or the order, and after a
resume. Where a plain `torch.Generator` is wanted instead, `as_sample_rng` wraps it behind the same interface.
"""

import zlib
from typing import Protocol

import torch
from torch import Tensor

# splitmix64 constants (Steele, Lea and Flood 2014), as signed 64-bit integers
_GAMMA = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX2 = 0x94D049BB133111EB - (1 << 64)
_MASK34 = (1 << 34) - 1
_MASK37 = (1 << 37) - 1
_MASK33 = (1 << 33) - 1


def _mix(x: Tensor) -> Tensor:
    """splitmix64 finaliser on int64 tensors, written into x; the masks make the arithmetic shifts logical."""
    x.bitwise_xor_((x >> 30).bitwise_and_(_MASK34)).mul_(_MIX1)
    x.bitwise_xor_((x >> 27).bitwise_and_(_MASK37)).mul_(_MIX2)
    return x.bitwise_xor_((x >> 31).bitwise_and_(_MASK33))


def _stream_key(stream: str) -> int:
    return zlib.crc32(stream.encode())


class SampleRng(Protocol):
    """Source of per-sample draws for a batch of B samples."""

    def uniform(self, stream: str, *shape: int) -> Tensor:
        """(B, *shape) float32 in [0, 1). A stream names what the draws are for; equal names give equal draws
        in `IndexedRng`, and fresh draws in `GeneratorRng`."""
        ...

    def shared(self, stream: str, *shape: int) -> Tensor:
        """`shape` float32 in [0, 1) on the CPU: one draw for the whole batch, equal on all processes."""
        ...

    def named(self, name: str) -> "SampleRng":
        """The same source for another purpose: streams of equal names are different ones behind it."""
        ...


class IndexedRng:
    """Draws keyed by (seed, step, sample index).

    Args:
        seed: any int; the run's seed.
        index: (B,) int64, the sample's identity (data set index, or the running number of a generated image).
        step: training step or epoch, so that the same sample gets new draws later; 0 for evaluation.
        name: prefix of all streams.
    """

    def __init__(self, seed: int, index: Tensor, step: int = 0, name: str = ""):
        self.seed, self.step, self.index, self.name = int(seed), int(step), index.to(torch.int64), name

    def uniform(self, stream: str, *shape: int) -> Tensor:
        count = 1
        for size in shape:
            count *= size
        device = self.index.device
        # filled on the device: a copy from the host would wait for it
        key = torch.full((1,), self.seed, dtype=torch.int64, device=device)
        key = _mix(key * _GAMMA + _stream_key(self.name + stream))
        key = _mix((key + self.step) * _GAMMA)
        key = _mix((key + self.index) * _GAMMA)  # (B,)
        sites = torch.arange(1, count + 1, dtype=torch.int64, device=device)
        bits = _mix(key[:, None] + sites[None, :] * _GAMMA)
        top24 = (bits >> 40).bitwise_and_((1 << 24) - 1)
        return top24.to(torch.float32).div_(1 << 24).view(len(self.index), *shape)

    def shared(self, stream: str, *shape: int) -> Tensor:
        alone = IndexedRng(self.seed, torch.zeros(1, dtype=torch.int64), self.step, f"{self.name}shared/")
        return alone.uniform(stream, *shape)[0]

    def named(self, name: str) -> "IndexedRng":
        return IndexedRng(self.seed, self.index, self.step, f"{self.name}{name}/")


class GeneratorRng:
    """Draws from a `torch.Generator` (or torch's global one), in call order."""

    def __init__(self, batch_size: int, generator: torch.Generator | None = None, device: torch.device | str = "cpu"):
        self.batch_size, self.generator = batch_size, generator
        self.device = generator.device if generator is not None else torch.device(device)
        self.target = torch.device(device)

    def uniform(self, stream: str, *shape: int) -> Tensor:
        draws = torch.rand(self.batch_size, *shape, generator=self.generator, device=self.device)
        return draws.to(self.target)

    def shared(self, stream: str, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self.generator, device=self.device).cpu()

    def named(self, name: str) -> "GeneratorRng":
        return self


def as_sample_rng(
    rng: "SampleRng | torch.Generator | None", batch_size: int, device: torch.device | str = "cpu"
) -> SampleRng:
    """Accept a `SampleRng`, a `torch.Generator`, or None (torch's global generator)."""
    if rng is None or isinstance(rng, torch.Generator):
        return GeneratorRng(batch_size, rng, device)
    return rng


def integers(uniform: Tensor, high: int) -> Tensor:
    """Map uniforms in [0, 1) to int64 in [0, high)."""
    return (uniform.double() * high).long().clamp_(max=high - 1)


def permutations(uniform: Tensor) -> Tensor:
    """(B, L) uniforms -> (B, L) int64 random permutations of 0..L-1."""
    return uniform.argsort(dim=1, stable=True)


def exponential(uniform: Tensor) -> Tensor:
    """Map uniforms in [0, 1) on a grid of 2^-24 to Exp(1) draws in [3e-8, 16.7].

    Each draw stands for the middle of its grid cell. Mapping 0 to (nearly) 0 instead would let a code of any
    positive probability win an exponential race once in 2^24 draws: with 4096 codes and 256 tokens, a random
    code in one image of 16.
    """
    return (uniform + 2.0**-25).clamp_max_(1 - 2.0**-24).neg_().log1p_().neg_()


def normal(uniform: Tensor) -> Tensor:
    """Map uniforms in [0, 1) on a grid of 2^-24 to N(0, 1) draws in [-5.4, 5.4], by the inverse distribution function.

    Each draw stands for the middle of its grid cell, so that none is infinite.
    """
    # in float64: 1 - 2^-25 is no float32
    return (2 * (uniform.double() + 2.0**-25) - 1).erfinv().mul(2**0.5).to(uniform.dtype)
