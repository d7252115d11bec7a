"""What a compiled module says of itself: the compiler's estimate of its time, and its collectives by kind and bytes."""

import collections
import dataclasses
import math
import re
from collections.abc import Callable, Iterable

COMPUTATION = re.compile(r'(ENTRY )?%?([\w.-]+) \(.*\{$')
LOOP = re.compile(r' while\(.*condition=%?([\w.-]+), body=%?([\w.-]+)')
CALL = re.compile(r' (?:fusion|call|async-start)\(.*calls=%?([\w.-]+)')
BOUND = re.compile(r' = s32\[\]\S* constant\((\d+)\)')
BELOW_BOUND = re.compile(r'ROOT .* compare\(.*direction=LT')
CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
COLLECTIVE = re.compile(r' = (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(-start)?\(')
ARRAY = re.compile(r'\b([a-z]+)(\d*)\w*\[([\d,]*)\]')
GROUPS_OF_MESH = re.compile(r'replica_groups=mesh\[(.*?)\] \{(.*?)\}')
GROUPS_BY_COUNT = re.compile(r'replica_groups=\[(\d+),(\d+)\]')
GROUPS_LISTED = re.compile(r'replica_groups=\{\{([\d,]+)\}')
CHANNEL = re.compile(r'channel_id=(\d+)')
SCATTERED = 'all-reduce-scatter'  # how the TPU compiler names a sum of which each device keeps a part


@dataclasses.dataclass(frozen=True)
class Collective:
  """One kind of collective in a step of one device: how often it runs, and the bytes that the device sends."""

  kind: str
  count: int
  sent: float


class Module:
  """A compiled module's text, read once."""

  def __init__(self, hlo: str):
    self._cycles, self._calls = collections.Counter(), collections.defaultdict(list)
    self._loops, self._collectives = collections.defaultdict(list), collections.defaultdict(list)
    bounds, counts_up, name = collections.defaultdict(list), set(), ''
    for line in hlo.splitlines():
      if head := COMPUTATION.match(line):
        name = 'ENTRY' if head[1] else head[2]
        continue
      if loop := LOOP.search(line):
        self._loops[name].append(loop.groups())
      elif bound := BOUND.search(line):
        bounds[name].append(int(bound[1]))
      elif BELOW_BOUND.search(line):
        counts_up.add(name)
      elif cycles := CYCLES.search(line):
        self._cycles[name] += int(cycles[1])
      if found := COLLECTIVE.search(line):
        self._collectives[name].append(_collective(found, line, name))
      elif call := CALL.search(line):
        self._calls[name].append(call[1])
    self._trips = {c: bounds[c][0] for c in counts_up if len(bounds[c]) == 1}

  def seconds(self, clock_hz: float) -> float:
    """The compiler's estimate, without collectives and kernels of one's own, for which it has none.

    Cycles of every instruction, those of a `scan` once per iteration. Any other loop counts once: of decoding, one token. (Cost
    analysis counts the body of a loop once, so it is no substitute.)

    Raises:
      ValueError: no instruction has an estimate.
    """
    cycles = sum(times * self._cycles[name] for name, times, _ in self._walk(lambda name: ()))
    if not cycles:
      raise ValueError('no instruction of the module has an estimate')
    return cycles / clock_hz

  def collectives(self) -> list[Collective]:
    """Of one run on one device, by kind, the largest first."""
    count, sent, seen = collections.Counter(), collections.Counter(), set()
    for name, times, body in self._walk(lambda name: self._calls[name]):
      for kind, bytes_, channel in self._collectives[name]:
        # One that goes on behind several fusions stands in each of them, always with its channel.
        if channel and (body, kind, bytes_, channel) in seen:
          continue
        seen.add((body, kind, bytes_, channel))
        count[kind] += times
        sent[kind] += times * bytes_
    return [Collective(kind, count[kind], bytes_) for kind, bytes_ in sent.most_common()]

  def _walk(
    self, called: Callable[[str], Iterable[str]], name: str = 'ENTRY', times: int = 1, body: str = 'ENTRY'
  ) -> Iterable[tuple[str, int, str]]:
    """Computations that run, how often, and the body of a loop that each is part of."""
    yield name, times, body
    for condition, inner in self._loops[name]:
      yield from self._walk(called, inner, times * self._trips.get(condition, 1), inner)
    for other in called(name):
      yield from self._walk(called, other, times, body)


def _collective(found: re.Match, line: str, computation: str) -> tuple[str, float, str]:
  """(kind, bytes that a device sends, its channel or ''): ring algorithms, which no other one undercuts."""
  kind, sent = _sent(found, line, computation)
  channel = CHANNEL.search(line)
  return kind, sent, channel[1] if channel else ''


def _sent(found: re.Match, line: str, computation: str) -> tuple[str, float]:
  arrays, kind = [_bytes(*a) for a in ARRAY.findall(found[1])], found[2]
  if found[3]:  # a started one's result lists operands, results and tokens of the hardware
    arrays = [max(arrays)]
  size, group = sum(arrays), _group_size(line)
  if kind == 'collective-permute':
    return kind, size
  if kind == 'all-reduce' and computation.startswith(SCATTERED):
    return 'reduce-scatter', size * (group - 1) / group
  share = {'all-gather': 1 / group, 'all-to-all': 1 / group, 'reduce-scatter': 1.0, 'all-reduce': 2 / group}[kind]
  return kind, size * share * (group - 1)


def _bytes(kind: str, bits: str, dims: str) -> float:
  return math.prod(int(d) for d in dims.split(',') if d) * (int(bits) / 8 if bits else 1)


def _group_size(line: str) -> int:
  """Devices that take part in one group of a collective."""
  if mesh := GROUPS_OF_MESH.search(line):
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
    return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", mesh[2]))
  if counted := GROUPS_BY_COUNT.search(line):
    return int(counted[2])
  listed = GROUPS_LISTED.search(line)
  return len(listed[1].split(',')) if listed else 1
