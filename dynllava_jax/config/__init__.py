"""Configuration as typed data: frozen dataclasses by what they describe, built strictly (`parsing`).

A run is described by an ml-collections ConfigDict (see `configs/`); `from_config_dict` turns it into the dataclasses
of this package. Past it nothing sees a ConfigDict.
"""

from dynllava_jax.config.added import ExitHeadConfig, MemoryConfig, PruningConfig
from dynllava_jax.config.benchmark import BenchConfig
from dynllava_jax.config.evaluation import PERPLEXITY, QUANTIZATIONS, EvalConfig, EvalRun, TrainEval
from dynllava_jax.config.model import (
  CLIP_MEAN,
  CLIP_STD,
  CLIP_TOKENIZER_FILES,
  IGNORE,
  IMAGE_ID,
  MODEL_FILES,
  TOKENIZER_FILES,
  ClipTextConfig,
  ExpertsConfig,
  LlamaConfig,
  ModelConfig,
  PredictorConfig,
  PyramidConfig,
  RelevanceConfig,
  RopeScaling,
  RoutersConfig,
  TokenPackerConfig,
  VisionConfig,
)
from dynllava_jax.config.objective import (
  ExpertsTraining,
  Objective,
  PruningTraining,
  PyramidTraining,
  RelevanceTraining,
  SparsityConfig,
)
from dynllava_jax.config.parsing import ConfigError, Options, differences, first_difference, from_config_dict, to_dict
from dynllava_jax.config.run import DENSE, MeshConfig, Piece, Stage, check_stages, judges_instructions
from dynllava_jax.config.training import DataConfig, LoraConfig, OptimizerConfig, TrainConfig

__all__ = [
  'CLIP_MEAN',
  'CLIP_STD',
  'CLIP_TOKENIZER_FILES',
  'DENSE',
  'IGNORE',
  'IMAGE_ID',
  'MODEL_FILES',
  'PERPLEXITY',
  'QUANTIZATIONS',
  'TOKENIZER_FILES',
  'BenchConfig',
  'ClipTextConfig',
  'ConfigError',
  'DataConfig',
  'EvalConfig',
  'EvalRun',
  'ExitHeadConfig',
  'ExpertsConfig',
  'ExpertsTraining',
  'LlamaConfig',
  'LoraConfig',
  'MemoryConfig',
  'MeshConfig',
  'ModelConfig',
  'Objective',
  'OptimizerConfig',
  'Options',
  'Piece',
  'PredictorConfig',
  'PruningConfig',
  'PruningTraining',
  'PyramidConfig',
  'PyramidTraining',
  'RelevanceConfig',
  'RelevanceTraining',
  'RopeScaling',
  'RoutersConfig',
  'SparsityConfig',
  'Stage',
  'TokenPackerConfig',
  'TrainConfig',
  'TrainEval',
  'VisionConfig',
  'check_stages',
  'differences',
  'first_difference',
  'from_config_dict',
  'judges_instructions',
  'to_dict',
]
