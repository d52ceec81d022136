"""LPIPS with the VGG16 backbone as a training loss."""

from pathlib import Path

from tessera.losses.lpips_network import LPIPSNetwork


class LPIPS(LPIPSNetwork):
    """Learned perceptual distance over five VGG16 stages, see `LPIPSNetwork`.

    It has neither parameters nor a state dict, so it stays frozen and out of checkpoints wherever it is held. The
    convolutions follow the precision around it; norms and sums are float32.

    Args:
        backbone_weights: torchvision's `vgg16-397923af.pth` (keys `features.N.weight`).
        linear_weights: the five linear layers (`lin0.model.1.weight`, ...); None: those in the installed `lpips` or
            `torchmetrics` package.

    Raises:
        MissingFileError: weights that aren't there.
        CheckpointError: a file of other content, or linear weights of another backbone.

    Source: Zhang et al. 2018 (arXiv:1801.03924), version 0.1.
    """

    def __init__(self, backbone_weights: str | Path, linear_weights: str | Path | None = None):
        super().__init__("vgg", backbone_weights, linear_weights, key="perceptual", without="perceptual=none")
