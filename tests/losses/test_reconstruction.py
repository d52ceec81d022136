import pytest
import torch

from tessera.errors import ConfigError
from tessera.losses import pixel_loss


def test_pixel_losses():
    x, y = torch.zeros(2, 3), torch.full((2, 3), 2.0)
    assert pixel_loss("mse")(x, y) == 4 and pixel_loss("l1")(x, y) == 2


def test_unknown_names():
    with pytest.raises(ConfigError, match=r"stage\.reconstruction_loss='l3' is unknown; choose one of mse, l1"):
        pixel_loss("l3")
