"""The look at all data before it costs accelerator time: every record read, every image decoded, in parallel.

Leaves `report.json` (counts and all ids by source and reason), `lengths.png` and a table.
"""

import collections
import dataclasses
import json
import pathlib
import time
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from rich.table import Table
from rich.text import Text

from dynllava_jax import paths
from dynllava_jax.config import ConfigError, DataConfig
from dynllava_jax.data import conversation
from dynllava_jax.data.index import CODES, Index, fit
from dynllava_jax.data.parts import WHOLE, Part
from dynllava_jax.data.records import Finding, Record, entry_name, examine, parse, read_json, unused_fields
from dynllava_jax.data.samples import REASONS, DataError
from dynllava_jax.data.tokenizer import load_tokenizer
from dynllava_jax.data.workers import parallel_map
from dynllava_jax.display import Terminal
from dynllava_jax.files import read_regular, write_atomically
from dynllava_jax.paths import Given
from dynllava_jax.progress import progress

REPORT_FILE, HISTOGRAM_FILE = 'report.json', 'lengths.png'
CHUNK = 500  # records per piece of work
MOST_FIELDS = 50  # names of unused fields that a report tells
NAMED = 3  # ids shown in the table
OF_FILES = ('missing_image', 'undecodable_image', 'outside_image')  # what can be mended while the JSON stays the same


@dataclasses.dataclass(frozen=True)
class Scan:
  """What is scanned, and how.

  Attributes:
    json: source name -> JSON or JSONL file.
    images: root of the image files.
    data: template, buckets, truncation.
    tokenizer: its files; without them lengths are not measured.
    num_patches: positions an image takes.
    processes: workers.
  """

  json: Mapping[str, pathlib.Path]
  images: Given
  data: DataConfig
  tokenizer: Mapping[str, bytes] | None
  num_patches: int
  processes: int


def read_sources(scan: Scan) -> tuple[list[Record | Finding], dict[str, dict[str, int]]]:
  """All entries, source by source, and how often each source has fields that are not used.

  Entries without LLaVA's structure, or with content that the model does not take, are findings.

  Raises:
    DataError: a file that is no list of samples.
  """
  out, fields = [], {}
  for source, path in scan.json.items():
    counts = collections.Counter()
    for number, entry in enumerate(read_json(path)):
      try:
        out.append(parse(entry, source, number))
        counts.update(unused_fields(entry))
      except DataError as e:
        out.append(Finding(entry_name(entry, source, number), source, e.reason, str(e)))
    fields[source] = dict(counts.most_common(MOST_FIELDS))
  return out, fields


def examine_all(
  scan: Scan, entries: Sequence[Record | Finding], folder: pathlib.Path, part: Part = WHOLE, finish: bool = False
) -> list[Finding] | None:
  """One finding per entry, in order. What is done is kept in `folder`, so that an interrupted scan goes on there.

  Images that could not be used are looked at again: they may have been mended since.

  Args:
    scan, entries, folder: what is examined, and where findings are kept.
    part: examine its pieces alone.
    finish: examine none that nobody has.

  Returns:
    None if pieces of other parts are not examined yet.

  Raises:
    ConfigError: there are such pieces, and `finish` was asked for.
  """
  folder.mkdir(parents=True, exist_ok=True)
  jobs = []
  for number, start in enumerate(range(0, len(entries), CHUNK)):
    jobs.append((scan, entries[start : start + CHUNK], folder / f'scan-{number:06d}.json'))
  own = [job for number, job in enumerate(jobs) if part.has(number)]
  todo = [job for job in own if (known := _read_part(job[2], len(job[1]))) is None or any(f.reason in OF_FILES for f in known)]
  missing = sum(_read_part(job[2], len(job[1])) is None for job in todo)
  if finish and missing:
    raise ConfigError(
      f'--finish: {missing:,} of {len(jobs):,} pieces are not checked: a part has not been run to its end; run it again, or leave '
      '--finish out to check and write all that is missing here'
    )
  done = sum(len(job[1]) for job in own) - sum(len(job[1]) for job in todo)
  watch, pictures = time.monotonic(), sum(isinstance(e, Record) and bool(e.image_path) for job in todo for e in job[1])
  with (
    parallel_map(_examine_chunk, todo, scan.processes) as sizes,
    progress(Terminal(), 'checking samples', sum(len(job[1]) for job in own), done=done) as advance,
  ):
    for size in sizes:
      advance(size)
  if pictures and not finish:
    rate = pictures / (time.monotonic() - watch)
    used = min(scan.processes, len(todo))
    Terminal().print(f'{pictures:,} images decoded: {rate:,.0f}/s, {rate / used:,.0f}/s for each of {used} processes')
  found = [_read_part(job[2], len(job[1])) for job in jobs]
  return None if None in found else [finding for findings in found for finding in findings]


def forget(folder: pathlib.Path) -> None:
  """Removes what `examine_all` kept."""
  for path in folder.glob('scan-*'):
    path.unlink()


def _read_part(path: pathlib.Path, size: int) -> list[Finding] | None:
  """What a scan left; None if there is nothing, or nothing that can be read."""
  try:
    found = [Finding(**f) for f in json.loads(read_regular(path))]
  except (OSError, ValueError, TypeError, RecursionError):
    return None
  return found if len(found) == size else None


def _examine_chunk(job: tuple[Scan, Sequence[Record | Finding], pathlib.Path]) -> int:
  scan, entries, path = job
  style = conversation.template(scan.data.conversation)
  tokenizer = load_tokenizer(scan.tokenizer) if scan.tokenizer else None
  findings = _read_part(path, len(entries)) or [None] * len(entries)
  for i, entry in enumerate(entries):
    if isinstance(entry, Finding):
      findings[i] = entry
    elif findings[i] is None or findings[i].reason in OF_FILES:
      findings[i] = examine(entry, style=style, tokenizer=tokenizer, images=scan.images, allow_outside=scan.data.allow_outside)
  write_atomically(path, json.dumps([dataclasses.asdict(f) for f in findings]).encode())
  return len(entries)


def with_buckets(scan: Scan, findings: Sequence[Finding]) -> list[Finding]:
  """The findings, those longer than the largest bucket marked; unchanged where lengths were not measured."""
  if not scan.tokenizer:
    return list(findings)
  _, reason = fit(Index.of(findings), scan.data, scan.num_patches)
  out = []
  for finding, code in zip(findings, reason):
    if code and not finding.reason:
      message = (
        f'sample {finding.id}: {finding.tokens - finding.has_image} text tokens, the largest bucket has {scan.data.text_length}'
      )
      finding = dataclasses.replace(finding, reason=CODES[code], message=message)
    out.append(finding)
  return out


def report(scan: Scan, findings: Sequence[Finding], fields: Mapping[str, Mapping[str, int]]) -> dict:
  """The content of `report.json`. `fields`: see `read_sources`."""
  sources = {}
  for name, path in scan.json.items():
    own = [f for f in findings if f.source == name]
    problems = collections.defaultdict(list)
    for f in own:
      if f.reason:
        problems[f.reason].append({'id': f.id, 'message': f.message})
    sources[name] = {
      'json': paths.named(path),
      'samples': len(own),
      'with_image': sum(f.has_image for f in own),
      'usable': sum(not f.reason for f in own),
      'unused_fields': fields[name],
      'problems': {r: {'count': len(p), 'samples': p} for r, p in sorted(problems.items())},
    }
  lengths = np.array([f.tokens - f.has_image for f in findings if f.tokens])
  marks = (50, 90, 99, 100)
  return {
    'sources': sources,
    'images': str(scan.images),
    'conversation': scan.data.conversation,
    'text_buckets': list(scan.data.text_buckets),
    'truncate': scan.data.truncate,
    'text_tokens': {f'p{q}': int(np.percentile(lengths, q)) for q in marks} if len(lengths) else 'not measured: no tokenizer given',
  }


def table(content: dict) -> Table:
  """The report for people: one line per reason, one column per source."""
  out = Table(title='data check')
  out.add_column('')
  for name in content['sources']:
    out.add_column(Text(name), justify='right')  # Text: in plain strings rich takes [x] and :x: for its own
  out.add_column('for example')
  sources = content['sources'].values()
  for row in ('samples', 'with_image', 'usable'):
    out.add_row(row.replace('_', ' '), *(f'{s[row]:,}' for s in sources), '', end_section=row == 'usable')
  for reason, meaning in REASONS.items():
    found = [s['problems'].get(reason, {'count': 0, 'samples': []}) for s in sources]
    if any(f['count'] for f in found):
      ids = [p['id'] for f in found for p in f['samples']][:NAMED]
      out.add_row(f'{reason}: {meaning}', *(f'{f["count"]:,}' for f in found), Text(', '.join(ids)), style='red')
  return out


def histogram(scan: Scan, findings: Sequence[Finding]) -> Figure:
  """Text lengths of all measured samples by source, with the buckets."""
  figure = Figure(figsize=(8, 4), layout='constrained')
  axes = figure.subplots()
  by_source = {name: [f.tokens - f.has_image for f in findings if f.source == name and f.tokens] for name in scan.json}
  top = max((max(v) for v in by_source.values() if v), default=1)
  axes.hist(
    list(by_source.values()), bins=np.linspace(0, max(top, scan.data.text_length) + 1, 80), stacked=True, label=list(by_source)
  )
  for size in scan.data.text_buckets:
    axes.axvline(size, color='black', linewidth=1)
    axes.annotate(str(size), (size, 1), xycoords=('data', 'axes fraction'), rotation=90, va='top', ha='right', fontsize=8)
  axes.set_yscale('log' if any(by_source.values()) else 'linear')
  axes.set(xlabel='text tokens per sample (vertical lines: buckets)', ylabel='samples')
  for label in axes.legend().get_texts():
    label.set_parse_math(False)  # names of files may hold $
  return figure
