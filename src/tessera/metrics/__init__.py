"""Figures of merit: what is measured, how, and under which name it may be reported."""

from tessera.metrics.classifier_features import DigitsFeatures, FashionFeatures
from tessera.metrics.codebook import CodebookUsage
from tessera.metrics.comparison import compare, compare_pairs
from tessera.metrics.features import FeatureExtractor, Features
from tessera.metrics.fid import FrechetDistance, frechet_distance
from tessera.metrics.image_sets import DatasetImageSet, ImageSet, TensorImageSet, open_images
from tessera.metrics.inception import InceptionFeatures, PytorchFIDFeatures
from tessera.metrics.inception_score import InceptionScore
from tessera.metrics.kid import KernelDistance
from tessera.metrics.linear_probe import TopKAccuracy
from tessera.metrics.lpips import LPIPS, LPIPSDistance
from tessera.metrics.perturbed_fid import measure_perturbed
from tessera.metrics.precision_recall import PrecisionRecall, precision_recall
from tessera.metrics.pretrained_features import TimmFeatures, TorchvisionFeatures
from tessera.metrics.protocol import Figure, Protocol
from tessera.metrics.reconstruction import PSNR, SSIM
from tessera.metrics.reference import Reference, load_reference
from tessera.metrics.statistics import Statistics

__all__ = [
    "LPIPS",
    "PSNR",
    "SSIM",
    "CodebookUsage",
    "DatasetImageSet",
    "DigitsFeatures",
    "FashionFeatures",
    "FeatureExtractor",
    "Features",
    "Figure",
    "FrechetDistance",
    "ImageSet",
    "InceptionFeatures",
    "InceptionScore",
    "KernelDistance",
    "LPIPSDistance",
    "PrecisionRecall",
    "Protocol",
    "PytorchFIDFeatures",
    "Reference",
    "Statistics",
    "TensorImageSet",
    "TimmFeatures",
    "TopKAccuracy",
    "TorchvisionFeatures",
    "compare",
    "compare_pairs",
    "frechet_distance",
    "load_reference",
    "measure_perturbed",
    "open_images",
    "precision_recall",
]
