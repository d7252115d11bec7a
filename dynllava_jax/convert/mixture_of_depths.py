"""What a p-MoD checkpoint's config says of its routers, and the run that it means.

The authors write their schedule for 32 layers; with another number of layers it is what it is in their code, see `methods.pmod`.
"""

import pathlib
import re
from typing import Any

from dynllava_jax import methods
from dynllava_jax.config import ConfigError, Piece, Stage
from dynllava_jax.convert.inputs import ConversionError
from dynllava_jax.models.stacks import routed_stages

MOD_LAYERS = 'mod_target_layers'
DECAY = re.compile(r'(\w+)_decay_(\d+\.\d+)_(\d+\.\d+)')
NORM = re.compile(r'tanh_(\d*\.?\d+)_(\d*\.?\d+)')
CONSTANT = {  # layers of these names, of so many
  'interleave': lambda layers: range(1, layers, 2),
  'deep_all': lambda layers: range(2, layers - 1),
  'deep_all_include_last': lambda layers: range(2, layers),
}


def options_of(file: pathlib.Path, config: dict[str, Any], layers: int) -> dict[str, Any]:
  """Our options of the authors' settings in `config`, of `file`; ConversionError for what this model does not have."""
  if MOD_LAYERS not in config:
    raise ConversionError(f'{file}: {MOD_LAYERS} is missing; expected the settings of p-MoD')
  named, options = str(config[MOD_LAYERS]), {'factor': config.get('mod_router_factor', 0.5)}
  if config.get('mod_target_token_type', 'vision_all') != 'vision_all':
    raise ConversionError(f'{file}: mod_target_token_type {config["mod_target_token_type"]!r} is not supported, only vision_all')
  norm = NORM.fullmatch(str(config.get('mod_weight_norm', 'tanh_0.2_1')))
  if norm is None:
    raise ConversionError(f'{file}: mod_weight_norm {config["mod_weight_norm"]!r} is not supported, only such as tanh_0.2_1')
  options |= {'gain': float(norm[1]), 'centre': float(norm[2])}
  if decay := DECAY.fullmatch(named):
    return options | {'schedule': decay[1], 'most': float(decay[2]), 'least': float(decay[3])}
  if named in CONSTANT:
    return options | {'schedule': 'constant', 'layers': tuple(CONSTANT[named](layers))}
  raise ConversionError(
    f'{file}: {MOD_LAYERS} is {named!r}, expected such as shiftedcos_decay_0.85_0.15, or one of {", ".join(CONSTANT)}'
  )


def routers_and_stages(file: pathlib.Path, config: dict[str, Any], layers: int) -> tuple[dict[str, Any], tuple[Stage, ...]]:
  """(fields of `RoutersConfig`, the stage list); ConversionError as `options_of`, or for settings that are impossible."""
  try:
    piece = Piece('pmod', options_of(file, config, layers))
    routing, options = methods.routing_of(Stage(layers=piece))
    marks = routing.layers(layers, options)
    routers = dict(method='pmod', bias=bool(config.get('mod_bias_enabled')), layers=tuple(i for i in range(layers) if marks[i]))
    return routers, routed_stages(piece, layers)
  except ConfigError as e:
    raise ConversionError(f'{file}: {e}') from None
