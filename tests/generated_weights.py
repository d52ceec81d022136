"""Weights drawn from the names of the parameters, as the notes of the recorded files describe."""

import zlib
from functools import cache

import numpy as np
import torch

from tessera.metrics.inception_network import InceptionNetwork


def draw(key: str, shape: tuple[int, ...], base_seed: int) -> np.ndarray:
    """Standard normal numbers that depend on the name alone."""
    state = np.random.RandomState((zlib.crc32(key.encode()) ^ base_seed) & 0xFFFFFFFF)
    return state.standard_normal(shape).astype(np.float32)


def published_shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the published state dict."""
    shapes = {}
    with torch.device("meta"):
        network = InceptionNetwork()
    for key, value in network.state_dict().items():
        if key.endswith("conv.weight"):
            shapes[key] = tuple(value.shape)
            for part in ("weight", "bias", "running_mean", "running_var"):
                shapes[key.replace("conv.weight", f"bn.{part}")] = (len(value),)
            shapes[key.replace("conv.weight", "bn.num_batches_tracked")] = ()
        elif key.startswith("fc."):
            shapes[key] = tuple(value.shape)
    return shapes


@cache
def generated_inception(base_seed: int) -> dict[str, torch.Tensor]:
    state = {}
    for key, shape in published_shapes().items():
        if key.endswith("num_batches_tracked"):
            state[key] = torch.zeros(shape, dtype=torch.int64)
            continue
        b = draw(key, shape, base_seed)
        if key.endswith("conv.weight"):
            b = b * np.float32(np.sqrt(2 / (shape[1] * shape[2] * shape[3])))
        elif key.endswith("bn.weight"):
            b = 1 + 0.1 * b
        elif key.endswith("running_var"):
            b = np.exp(0.2 * b)
        else:
            b = (0.05 if key == "fc.weight" else 0.1) * b
        state[key] = torch.from_numpy(np.asarray(b, dtype=np.float32))
    return state
