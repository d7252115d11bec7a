"""What the three root scripts share: config flags whose mistakes are one readable line, not a traceback."""

import ast
import contextlib
import json
import os
import pathlib
import re
import select
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any

from absl import app, flags, logging
from ml_collections import config_flags

from dynllava_jax import hosts, paths, remote
from dynllava_jax.config import QUANTIZATIONS, ConfigError, from_config_dict
from dynllava_jax.data.samples import DataError
from dynllava_jax.display import printable
from dynllava_jax.files import read_regular, require_writable


def define_config() -> flags.FlagHolder:
  """`--config=FILE[:NAME]` with overrides `--config.a.b=value`, unknown keys refused."""
  return config_flags.DEFINE_config_file('config', None, 'Config file, such as configs/digits.py:base.')


LONGEST = 600  # characters of a message about the command line
LONGEST_LINE = 3000  # of any other, which may name some files
LARGEST_CONFIG = 2**20  # bytes of a config file
_SHIPPED_CONFIG = re.compile(r'^((?:--?config=)?)(configs/[^:]+)')  # the file's name, after `--config=` or `--config `
_PATHS: list[str] = []  # names of the flags that are paths


def define_path(name: str, default: str | None, text: str, *, several: bool = False, **options: Any) -> flags.FlagHolder:
  """A flag that is a path, or several: checked by `run` before anything else, made a path by `paths.given`."""
  _PATHS.append(name)
  return (flags.DEFINE_multi_string if several else flags.DEFINE_string)(name, default, text, **options)


_COMPILED = define_path(
  'compilation_cache', None, 'Folder where compiled programs are kept, "off" for none; by default in ~/.cache/dynllava_jax.'
)


def define_quantization() -> flags.FlagHolder:
  """The flag --quantization, as in `config.EvalRun`."""
  text = "int8: the decoder's matrices as int8, int8_cache: keys and values, int8_all: both; as stored if not given."
  return flags.DEFINE_enum('quantization', None, list(filter(None, QUANTIZATIONS)), text)


def path(flag: flags.FlagHolder) -> paths.Given | None:
  """The path that a flag gives; None if it is not given."""
  return None if flag.value is None else paths.given(flag.value, f'--{flag.name}')


def read(flag: flags.FlagHolder) -> pathlib.Path | None:
  """The file or folder that a flag gives, on this machine: of an object store its copy."""
  return None if flag.value is None else remote.fetched(path(flag))


def open_folder(flag: flags.FlagHolder) -> pathlib.Path | None:
  """The folder that a flag gives; of an object store the place on this machine where `remote.here` brings what is asked for."""
  return None if flag.value is None else remote.opened(path(flag))


def parse(cls: type, value: Any) -> Any:
  """The typed form of the `--config` flag's value; ConfigError if there is none or it is wrong."""
  if value is None:
    raise ConfigError('--config is missing; for example --config=configs/digits.py:base')
  try:
    value.keys()
  except OSError as e:  # ml_collections hands out a value that fails when it is used
    raise ConfigError(f'--config: {_one_line(e)}') from None
  except AttributeError:
    raise ConfigError(f'--config: its get_config returns {type(value).__name__}, expected a ConfigDict') from None
  return from_config_dict(cls, value)


def stages(flag: flags.FlagHolder) -> Any:
  """A flag that says how a checkpoint is run (see `api.load`): a name, or a list written as JSON. ConfigError if it is none."""
  if not (flag.value or '').startswith('['):
    return flag.value
  try:
    return json.loads(flag.value)
  except (ValueError, RecursionError) as e:
    example = '[{"start": 0}, {"start": 2, "selector": "dynamic"}]'
    raise ConfigError(f'--{flag.name}: not JSON ({e}); for example {example}') from None


def output_directory(flag: flags.FlagHolder) -> paths.Given:
  """The folder that a flag gives, which need not exist yet; ConfigError if nothing can be written there."""
  given = path(flag)
  if paths.is_local(given):
    try:
      require_writable(given)
    except OSError as e:
      why = f'{e.strerror}: {e.filename}'
      raise ConfigError(f'--{flag.name}={flag.value}: cannot be written ({why}); choose another, or mend that one') from None
  return given


def expected(error: Exception) -> bool:
  """Whether it is the user's to mend: then its message is all that is shown."""
  if isinstance(error, (ConfigError, DataError, FloatingPointError, OSError)):
    return True
  from dynllava_jax.arguments import ArgumentError  # these bring jax along, which scoring does without
  from dynllava_jax.checkpoint import CheckpointError
  from dynllava_jax.convert.readers import ConversionError

  return isinstance(error, (ArgumentError, CheckpointError, ConversionError))


@contextlib.contextmanager
def readable_errors() -> Iterator[None]:
  """Turns expected errors into one message on stderr and exit status 1, Ctrl-C into one and 130."""
  with _printing():
    try:
      yield
    except KeyboardInterrupt as e:
      message = printable('; '.join(['interrupted', *map(str, e.args)]), lines=True)
      hosts.failed(message)
      print(message, file=sys.stderr)
      sys.exit(130)
    except Exception as e:
      if not expected(e):
        hosts.wait_for_the_news()
        hosts.failed(f'{type(e).__name__}, see what it wrote')
        raise
      hosts.failed(printable(e))
      sys.exit(1 if isinstance(e, BrokenPipeError) and _nobody_reads() else f'error: {_in_short(e)}')


@contextlib.contextmanager
def _printing() -> Iterator[None]:
  """Whatever is printed can be: letters that the terminal's encoding lacks as escapes, and one line where it does not arrive.

  Who closes the other end of a pipe, as `head` does, has seen enough: the program ends without a word.
  """
  if hasattr(sys.stdout, 'reconfigure'):
    sys.stdout.reconfigure(errors='backslashreplace')
  try:
    yield
  finally:
    if why := _unprinted():
      os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python tries again when it ends, and has its own words
      ended = sys.exc_info()[1]
      if ended is None or (isinstance(ended, SystemExit) and (not ended.code or str(why) in str(ended.code))):
        sys.exit(1 if isinstance(why, BrokenPipeError) else f'error: what the program prints cannot be written ({why.strerror})')


def _nobody_reads() -> bool:
  """Whether the other end of the pipe that is printed to is closed."""
  look = select.poll()
  look.register(sys.stdout.fileno(), 0)  # errors alone
  return bool(look.poll(0))


def _unprinted() -> OSError | None:
  """Why what was printed cannot reach its reader, if it cannot."""
  try:
    if sys.stdout is not None:  # as where it is closed
      sys.stdout.flush()
  except OSError as e:
    return e
  return None


def join_hosts() -> None:
  """Makes this process one of several, one per host; ConfigError if the others cannot be found."""
  try:
    hosts.join()
  except (RuntimeError, ValueError) as e:
    raise ConfigError(f'--multihost: {_one_line(e)}; leave it out on a single host') from None


def parsed(argv: list[str], values: flags.FlagValues = flags.FLAGS) -> list[str]:
  """What absl makes of a command line; SystemExit with one line for a mistake in it, or in the config file that it names."""
  try:
    _check_config_file(argv)
  except (ConfigError, OSError) as e:
    sys.exit(f'error: {_one_line(e)}')
  try:
    return values([_SHIPPED_CONFIG.sub(lambda m: m[1] + paths.shipped(m[2]), a) for a in argv])
  except flags.Error as e:
    if found := re.search(r'of field (\S+) is not supported for overriding', str(e)):  # what is None in the file
      sys.exit(f'error: --{found[1]}: is null in the config file, and no flag replaces that; set it in the file')
    sys.exit(f'error: {_one_line(e)}')
  except Exception as e:
    if not isinstance(e, (OSError, ValueError)) and (where := _in_config_file(argv, e)):
      sys.exit(f'error: --config: {where}: {type(e).__name__}: {_one_line(e)}')
    if isinstance(e, AttributeError):  # ml_collections' word for an unknown key
      sys.exit(_unknown_key(argv, e))
    if isinstance(e, (KeyError, IndexError)):
      sys.exit(f'error: an override names what the config does not have: {_one_line(e)}')
    if isinstance(e, (OSError, ValueError, TypeError)):
      sys.exit(f'error: --config: {_one_line(e)}')
    raise


def run(main: Callable[[list[str]], None]) -> None:
  """`app.run` whose flag errors are one line and exit status 1."""

  def without_strays(argv):
    if len(argv) > 1:
      sys.exit(f'error: {argv[1]!r}: unexpected; options are written --name=value')
    with readable_errors():
      for name in _PATHS:
        value = flags.FLAGS[name].value
        for text in value if isinstance(value, list) else [value] if value is not None else []:
          paths.given(text, f'--{name}')
      if _COMPILED.value is not None:
        paths.given_compiled(_COMPILED.value, '--compilation_cache')
        os.environ[paths.COMPILED] = _COMPILED.value  # read by `compilation`, which brings jax along
    if getattr(flags.FLAGS, 'multihost', False):
      hosts.guard()
    main(argv)

  logging.set_verbosity(logging.WARNING)  # what jax and orbax say of themselves is not for users
  # Orbax's errors come as exceptions, too; asyncio and the pools tell again of those that came to its tasks.
  retold = ('asyncio', 'concurrent.futures')
  logging.get_absl_handler().addFilter(lambda record: 'orbax' not in record.pathname and record.name not in retold)
  sys.unraisablehook = _unraisable
  app.run(without_strays, flags_parser=parsed)


def _config_file(argv: list[str]) -> str | None:
  """The file that `--config` names, None without one."""
  for i, text in enumerate(argv):
    if found := re.fullmatch(r'--?config(=(.*))?', text, re.DOTALL):
      given = found[2] if found[1] else next(iter(argv[i + 1 :]), '')
      return paths.shipped(given.partition(':')[0])
  return None


def _check_config_file(argv: list[str]) -> None:
  """ConfigError unless the file that `--config` names is one that ends and holds Python with `get_config`."""
  if (file := _config_file(argv)) is None:
    return
  path = paths.given(file, '--config')
  if not paths.is_local(path):
    raise ConfigError(f'--config: {file}: config files are read on this machine; copy it, or give one of configs/')
  try:
    code = read_regular(path, LARGEST_CONFIG)
  except (OSError, ValueError) as e:
    raise ConfigError(f'--config: {path}: {getattr(e, "strerror", e)}; for example configs/digits.py:base') from None
  try:
    names = {name for node in ast.walk(ast.parse(code)) for name in _defined(node)}
  except (SyntaxError, ValueError, RecursionError, MemoryError) as e:
    line = f', line {e.lineno}' if getattr(e, 'lineno', None) else ''
    raise ConfigError(f'--config: {path}{line}: no Python ({getattr(e, "msg", e)}); for example configs/digits.py:base') from None
  if 'get_config' not in names:
    raise ConfigError(f'--config: {path}: has no function get_config; for example configs/digits.py:base')


def _defined(node: ast.AST) -> list[str]:
  """The names that a statement gives something, of those that a config file defines `get_config` with."""
  if isinstance(node, (ast.Import, ast.ImportFrom)):
    return [a.asname or a.name for a in node.names]
  return [node.name] if isinstance(node, ast.FunctionDef) else [node.id] if isinstance(node, ast.Name) else []


def _in_config_file(argv: list[str], error: Exception) -> str:
  """FILE, line N of the config file where an error comes from, '' if it does not come from there."""
  file = _config_file(argv)
  frames = [f for f in traceback.extract_tb(error.__traceback__) if file and os.path.abspath(f.filename) == os.path.abspath(file)]
  return f'{file}, line {frames[-1].lineno}' if frames else ''


def _unraisable(told: Any) -> None:
  """What no code can catch is shown, but for writes that end after the first one that failed, which has been told of."""
  if str(told.exc_value) != 'Event loop is closed':  # asyncio's words to tensorstore
    sys.__unraisablehook__(told)


def _one_line(error: Exception) -> str:
  """The message without line breaks; of a traceback inside a message, only its last line."""
  message = str(error)
  if 'Traceback (most recent call last)' in message:
    message = message.strip().splitlines()[-1].partition(': ')[2]
  return _cut(printable(' '.join(message.split())), LONGEST)


def _in_short(error: Exception) -> str:
  """The message, in lines none of which fills a screen: it may repeat what was given."""
  return '\n'.join(_cut(line, LONGEST_LINE) for line in printable(error, lines=True).split('\n'))


def _cut(text: str, longest: int) -> str:
  return text if len(text) <= longest else f'{text[: longest - 100]} ... {text[-90:]}'


def _unknown_key(argv: list[str], error: AttributeError) -> str:
  """ml_collections' message for an unknown key, with the flag it came from."""
  message = str(error)
  key = re.search(r'\w+', message).group()
  given = next((a.split('=')[0] for a in argv if a.startswith('--config.') and f'{key}=' in a), f'--config...{key}')
  near = re.search(r'Did you mean "(\w+)"', message)
  if near:
    return f'error: {given}: unknown key; did you mean {given.removesuffix(key)}{near.group(1)}?'
  return f'error: {given}: the config file does not list it; flags change what is listed, anything else is set in the file'
