"""The benchmarks by name."""

from dynllava_jax.config import ConfigError
from dynllava_jax.evals.benchmarks.base import Benchmark
from dynllava_jax.evals.benchmarks.digits import Digits
from dynllava_jax.evals.benchmarks.gqa import Gqa
from dynllava_jax.evals.benchmarks.judged import LlavaBench, MmVet
from dynllava_jax.evals.benchmarks.longanswers import LvisMulti, LvisSingle, ShareGpt4v
from dynllava_jax.evals.benchmarks.mmbench import MmBench, MmBenchCn
from dynllava_jax.evals.benchmarks.mme import Mme
from dynllava_jax.evals.benchmarks.pope import Pope
from dynllava_jax.evals.benchmarks.questions import OwnQuestions
from dynllava_jax.evals.benchmarks.scienceqa import ScienceQa
from dynllava_jax.evals.benchmarks.seed import Seed
from dynllava_jax.evals.benchmarks.textvqa import TextVqa
from dynllava_jax.evals.benchmarks.vqa import Vizwiz, VizwizVal, Vqav2, Vqav2Val

BENCHMARKS: dict[str, Benchmark] = {
  b.name: b()
  for b in (
    Vqav2,
    Vqav2Val,
    Gqa,
    Vizwiz,
    VizwizVal,
    ScienceQa,
    TextVqa,
    Pope,
    Mme,
    MmBench,
    MmBenchCn,
    Seed,
    LlavaBench,
    MmVet,
    LvisSingle,
    LvisMulti,
    ShareGpt4v,
    Digits,
    OwnQuestions,
  )
}


def get(name: str, where: str = 'config.benchmark') -> Benchmark:
  """The benchmark called `name`, hyphens, underscores and case aside; ConfigError with the known names otherwise."""
  plain = lambda text: text.lower().replace('-', '').replace('_', '')
  found = next((b for n, b in BENCHMARKS.items() if plain(n) == plain(name)), None)
  if found is None:
    raise ConfigError(f'{where}: {name!r} is unknown; expected one of {", ".join(BENCHMARKS)}')
  return found
