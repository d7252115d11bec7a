"""A checkpoint as a server for OpenAI clients, browsers and Prometheus.

    python -m dynllava_jax.serve --checkpoint=CHECKPOINT

Answers /v1/chat/completions, /v1/models, /health and /metrics, and shows people a page at /. SIGTERM lets it finish what it has
begun. See docs/inference.md.
"""

import sys

from absl import flags

from dynllava_jax import command_line
from dynllava_jax.config import ConfigError
from dynllava_jax.files import decoded, read_regular

CHECKPOINT = command_line.define_path('checkpoint', None, 'Checkpoint directory, or one step in it.')
HOST = flags.DEFINE_string('host', '127.0.0.1', 'Address to listen at; 0.0.0.0 for all of this machine.')
PORT = flags.DEFINE_integer('port', 8000, 'Port to listen at; 0 takes a free one.', lower_bound=0, upper_bound=65535)
NAME = flags.DEFINE_string('name', None, "What clients call the model; the checkpoint's folder if not given.")
STAGES = flags.DEFINE_string(
  'stages', None, "How it is run: dense, dynamic, dynamic_N, a method, or a JSON list; the checkpoint's own."
)
ALSO = flags.DEFINE_list('also', ['dense'], 'Further ways to run it, offered as NAME:WAY; each has slots of its own.')
CONTROLLER = flags.DEFINE_enum('controller', None, ['target'], 'target: how sparsely a request is run follows the load.')
ROOM = flags.DEFINE_integer('room_mib', 0, "The controller's, for keys and values; 0 is that of the slots, dense.", lower_bound=0)
SLOTS = flags.DEFINE_integer('slots', 8, 'Questions that each way answers at once.', lower_bound=1, upper_bound=2**16)
STEPS = flags.DEFINE_integer('steps', 8, 'Tokens per dispatch.', lower_bound=1)
MAX_NEW_TOKENS = flags.DEFINE_integer('max_new_tokens', 256, 'Most tokens of an answer.', lower_bound=1)
TEXT_LENGTHS = flags.DEFINE_multi_integer('text_lengths', [64, 256, 1024], 'Text buckets.')
DTYPE = flags.DEFINE_enum('dtype', None, ['float32', 'bfloat16'], 'Of the computation; bfloat16 on accelerators if not given.')
QUANTIZATION = command_line.define_quantization()
TENSOR = flags.DEFINE_integer('tensor', 1, 'Devices that hold the weights together; each group has engines.', lower_bound=1)
API_KEYS = command_line.define_path('api_keys', None, 'File with the keys of clients, one a line; without it anybody may ask.')
MAX_BODY = flags.DEFINE_integer('max_body_mib', 20, 'Largest request, MiB.', lower_bound=1)
MAX_PIXELS = flags.DEFINE_integer('max_pixels', 2**25, 'Largest picture.', lower_bound=1)
QUEUE = flags.DEFINE_integer('queue', 256, 'Requests that may wait for each way; further ones are refused with 429.', lower_bound=1)
TIMEOUT = flags.DEFINE_float('timeout', 300.0, 'Seconds after which an answer is given up.', lower_bound=0.001)
DRAIN = flags.DEFINE_float('drain', 60.0, 'Seconds for what is being answered once SIGTERM came.', lower_bound=0.0)

LARGEST_KEYS = 2**20  # bytes of their file


def main(_) -> None:
  """Serves."""
  with command_line.readable_errors():
    if CHECKPOINT.value is None:
      raise ConfigError('--checkpoint is missing')
    try:
      import fastapi
      import prometheus_client
      import uvicorn
    except ImportError as e:
      raise ConfigError(f'{e.name} is missing; pip install -r requirements-serve.txt') from None
    del fastapi, prometheus_client, uvicorn
    if ROOM.value and not CONTROLLER.value:
      raise ConfigError('--room_mib is of the controller; add --controller=target')
    keys = _keys()
    path = command_line.path(CHECKPOINT)
    from dynllava_jax import api
    from dynllava_jax.display import Terminal
    from dynllava_jax.server import offers, running
    from dynllava_jax.server.app import Limits

    console = Terminal(file=sys.stderr)
    stages = command_line.stages(STAGES)
    made = offers.offers(path, NAME.value or api.name_of(path), stages, ALSO.value, QUANTIZATION.value)
    sizes = offers.Sizes(SLOTS.value, STEPS.value, MAX_NEW_TOKENS.value, tuple(sorted(set(TEXT_LENGTHS.value))), QUEUE.value)
    for length in sizes.text_lengths:
      if length < 1:
        raise ConfigError(f'--text_lengths: {length}, expected at least 1')
    running.run(
      made,
      dtype=api.dtype_of(DTYPE.value),
      tensor=TENSOR.value,
      sizes=sizes,
      room=ROOM.value * 2**20 if CONTROLLER.value else None,
      limits=Limits(keys, MAX_BODY.value * 2**20, MAX_PIXELS.value, TIMEOUT.value),
      host=HOST.value,
      port=PORT.value,
      drain=DRAIN.value,
      tell=console.print,
    )


def _keys() -> list[str]:
  """The clients' keys; ConfigError for a file without any, which would let everybody in."""
  if API_KEYS.value is None:
    return []
  try:
    text = decoded(read_regular(command_line.read(API_KEYS), LARGEST_KEYS))
  except (OSError, UnicodeDecodeError) as e:
    why = e.strerror if isinstance(e, OSError) else 'it is no text'
    raise ConfigError(f'--api_keys={API_KEYS.value}: cannot be read ({why}); expected keys, one a line') from None
  keys = [line.strip() for line in text.splitlines() if line.strip()]
  if not keys:
    raise ConfigError(f'--api_keys={API_KEYS.value}: holds no key, expected one a line')
  return keys


if __name__ == '__main__':
  command_line.run(main)
