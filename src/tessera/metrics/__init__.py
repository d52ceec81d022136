"""Figures of merit: what is measured, how, and under which name it may be reported."""

from tessera.metrics.classifier_features import DigitsFeatures, FashionFeatures
from tessera.metrics.codebook import CodebookUsage
from tessera.metrics.features import FeatureExtractor
from tessera.metrics.fid import FrechetDistance, frechet_distance
from tessera.metrics.inception import InceptionFeatures
from tessera.metrics.protocol import Figure, Protocol
from tessera.metrics.reconstruction import PSNR, SSIM
from tessera.metrics.statistics import Statistics

__all__ = [
    "PSNR",
    "SSIM",
    "CodebookUsage",
    "DigitsFeatures",
    "FashionFeatures",
    "FeatureExtractor",
    "Figure",
    "FrechetDistance",
    "InceptionFeatures",
    "Protocol",
    "Statistics",
    "frechet_distance",
]
