"""What a server tells Prometheus: counted as answers end, and looked up when somebody asks. Names begin with `dynllava_`."""

from collections.abc import Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric

from dynllava_jax.server.driver import Driver
from dynllava_jax.server.offers import Offer, Sizes
from dynllava_jax.serving import growth
from dynllava_jax.serving.engine import Engine
from dynllava_jax.serving.ticket import Ticket

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100)
BY = ('model', 'rung')


class Metrics:
  """All numbers of a server. `text` is what /metrics answers."""

  def __init__(self, offers: dict[str, Offer], sizes: Sizes):
    self._offers, self._sizes = offers, sizes
    self._drivers: Sequence[Driver] = ()
    self.registry = CollectorRegistry()
    counter = lambda name, text, labels=BY: Counter(f'dynllava_{name}', text, labels, registry=self.registry)
    histogram = lambda name, text: Histogram(f'dynllava_{name}', text, BY, buckets=SECONDS, registry=self.registry)
    self._requests = counter('requests', 'Answered requests, by how they ended.', (*BY, 'finish'))
    self.refused = counter('refused', 'Requests that were not answered, by HTTP status.', ('status',))
    self._prompt = counter('prompt_tokens', 'Tokens of prompts, the image included.')
    self._generated = counter('generated_tokens', 'Tokens of answers.')
    self._image = counter('image_tokens', 'Image tokens that came in.')
    self._image_kept = counter('image_tokens_kept', 'Image tokens behind the last cut.')
    self._text_kept = counter('generated_tokens_kept', 'Generated tokens whose keys and values stay behind the last cut.')
    self._first = histogram('first_token_seconds', 'From being asked to the first token.')
    self._total = histogram('request_seconds', 'From being asked to the end.')
    self.registry.register(self)
    ProcessCollector(registry=self.registry)

  def watch(self, drivers: Sequence[Driver]) -> None:
    """Tells whom to look at."""
    self._drivers = drivers

  def over(self, name: str, ticket: Ticket) -> None:
    """Counts a request that is over."""
    by, offer = (name, ticket.rung), self._offers[name]
    prompt = ticket.request.rows.prompt
    self._requests.labels(*by, ticket.finish if ticket.error is None else 'failed').inc()
    self._prompt.labels(*by).inc(int(prompt.length[0]))
    self._generated.labels(*by).inc(len(ticket.output.tokens))
    self._text_kept.labels(*by).inc(max(0, sum(ticket.kept) - ticket.evicted))
    if ticket.begun and prompt.image_start[0] >= 0:
      self._image.labels(*by).inc(offer.loaded.num_image)
      self._image_kept.labels(*by).inc(len(ticket.kept_image()))
    if ticket.first:
      self._first.labels(*by).observe(ticket.first - ticket.asked)
    self._total.labels(*by).observe(ticket.ended - ticket.asked)

  def text(self) -> bytes:
    """In Prometheus' text format."""
    return generate_latest(self.registry)

  def collect(self) -> Iterator[Metric]:
    """What is looked up: the present state of drivers and engines."""
    gauge = lambda name, text, labels=('model',): GaugeMetricFamily(f'dynllava_{name}', text, labels=labels)
    waiting, slots, used = gauge('waiting', 'Requests in line.'), gauge('slots', 'Slots.'), gauge('slots_used', 'Slots in use.')
    kv = gauge('kv_slots_used', 'Slots of keys and values in use, over all layers.')
    room = gauge('kv_slots', 'Slots of keys and values that there are, over all layers.')
    compiled = gauge('compilations', 'Programs compiled so far.')
    rung = gauge('rung_slots', 'Slots of the rung in use, if a controller chooses it.', BY)
    for name in self._offers:
      tickets = [t for driver in self._drivers for t in driver.tickets(name)]
      engines = [driver.engines[name] for driver in self._drivers]
      begun = [t for t in tickets if t.begun]
      waiting.add_metric([name], len(tickets) - len(begun))
      slots.add_metric([name], sum(e.slots for e in engines))
      used.add_metric([name], len(begun))
      kv.add_metric([name], sum(self._held(driver.engines[name], driver.tickets(name)) for driver in self._drivers))
      room.add_metric([name], sum(self._room(engine) for engine in engines))
      for engine in engines:
        if present := engine.pools.present.rung:
          rung.add_metric([name, present], engine.slots)
      compiled.add_metric([name], sum(e.compilations() for e in engines))
    speed = gauge('tokens_per_second', 'Generated lately, by all engines.', ())
    speed.add_metric([], sum(d.tokens_per_second() for d in self._drivers))
    yield from (waiting, slots, used, kv, room, compiled, rung, speed, self._shares())

  def _held(self, engine: Engine, tickets: Sequence[Ticket]) -> int:
    """Slots of keys and values that requests take up so far."""
    model, total = engine.generator.model, 0
    for ticket in tickets:
      prompt, kept = ticket.request.rows.prompt, tuple(ticket.kept)
      if ticket.begun:
        image = model.num_image if prompt.image_start[0] >= 0 else 0
        text = int(prompt.length[0]) - image
        total += sum(growth.slots(model.cfg, model.stages, text, image, len(kept), max(0, sum(kept) - ticket.evicted)))
    return total

  def _room(self, engine: Engine) -> int:
    """Those that its longest requests may take up."""
    model, new = engine.generator.model, self._sizes.max_new_tokens
    return engine.slots * sum(growth.slots(model.cfg, model.stages, max(self._sizes.text_lengths), model.num_image, new, new))

  def _shares(self) -> Metric:
    """Kept share of image and of answers, since the start."""
    out = GaugeMetricFamily('dynllava_kept_share', 'Of the tokens so far, how many stay behind the last cut.', labels=('of',))
    total = lambda counter: sum(s.value for m in counter.collect() for s in m.samples if s.name.endswith('_total'))
    for of, kept, seen in (('image', self._image_kept, self._image), ('answer', self._text_kept, self._generated)):
      if seen_total := total(seen):
        out.add_metric([of], total(kept) / seen_total)
    return out
