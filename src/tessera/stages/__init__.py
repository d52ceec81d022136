"""Stages: the three trainings, and evaluation, as LightningModules."""

from tessera.stages.evaluation import Evaluation
from tessera.stages.generator import GeneratorTraining
from tessera.stages.post_training import DecoderPostTraining
from tessera.stages.proxy_codes import ProxyCodeTraining
from tessera.stages.tokenizer import TokenizerTraining

__all__ = ["DecoderPostTraining", "Evaluation", "GeneratorTraining", "ProxyCodeTraining", "TokenizerTraining"]
