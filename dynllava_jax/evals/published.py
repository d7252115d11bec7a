"""What papers print for LLaVA-1.5-7B with fewer image tokens: figures with their source, to stand beside one's own.

Figures of one lineage were measured, or handed on, under one protocol; between lineages protocols differ, and with them the dense
model's row. Which tokens a table counts differs too: VScan's and PyramidDrop's are averages over layers, VisionZip's and DivPrune's
what enters the decoder, and SparseVLM's labels are lower than what its code keeps.
"""

import dataclasses

LINEAGES = {
  'A': 'tables of VScan (arXiv 2505.22654) and MMTok (arXiv 2508.18264), which hand on those of SparseVLM (2410.04417) and '
  'VisionZip (2412.04467); MME is perception and cognition, of 2800',
  'B': 'tables of CDPruner (arXiv 2506.10967), methods run again with strictly so many tokens; MME is perception, of 2000',
}
BENCHMARKS = {
  'A': ('gqa', 'mmbench', 'mme', 'pope', 'scienceqa', 'vqav2', 'textvqa'),
  'B': ('vqav2', 'gqa', 'scienceqa', 'textvqa', 'pope', 'mme', 'mmbench', 'mmvet'),
}
TABLE: dict[tuple[str, int], dict[str, tuple[float, ...]]] = {
  ('A', 576): {'dense': (61.9, 64.7, 1862, 85.9, 69.5, 78.5, 58.2)},
  ('A', 192): {
    'fastv': (52.7, 61.2, 1612, 64.8, 67.3, 67.1, 52.5),
    'sparsevlm': (57.6, 62.5, 1721, 83.6, 69.1, 75.6, 56.1),
    'pyramiddrop': (57.3, 63.3, 1797, 82.3, 69.0, 75.1, 56.5),
    'visionzip': (59.3, 63.0, 1783, 85.3, 68.9, 76.8, 57.3),  # VScan prints 77.4 for VQAv2, which is the tuned projector's
    'divprune': (60.0, 62.5, 1762, 87.0, 68.7, 76.9, 57.0),
    'vscan': (60.6, 63.9, 1806, 86.2, 68.6, 77.8, 57.7),
  },
  ('A', 128): {
    'fastv': (49.6, 56.1, 1490, 59.6, 60.2, 61.8, 50.6),
    'sparsevlm': (56.0, 60.0, 1696, 80.5, 67.1, 73.8, 54.9),
    'pyramiddrop': (57.1, 61.6, 1761, 82.3, 68.4, 72.9, 56.6),
    'visionzip': (57.6, 62.0, 1762, 83.2, 68.9, 75.6, 56.8),
    'divprune': (59.3, 62.0, 1718, 86.7, 68.7, 76.0, 56.1),
    'vscan': (59.8, 63.0, 1792, 86.1, 68.9, 77.1, 57.3),
  },
  ('A', 64): {
    'fastv': (46.1, 48.0, 1256, 48.0, 51.1, 55.0, 47.8),
    'sparsevlm': (52.7, 56.2, 1505, 75.1, 62.2, 68.2, 51.8),
    'pyramiddrop': (47.5, 58.8, 1561, 55.9, 69.2, 69.2, 50.6),  # other papers print 41.9, 33.3, 1092, 55.9, 68.6, -, 45.9
    'visionzip': (55.1, 60.1, 1690, 77.0, 69.0, 72.4, 55.5),
    'divprune': (57.8, 59.3, 1674, 85.6, 68.1, 74.1, 54.7),
    'vscan': (58.3, 62.1, 1698, 85.0, 69.1, 75.4, 55.6),
  },
  ('B', 576): {'dense': (78.5, 61.9, 69.6, 58.2, 85.9, 1513, 64.7, 31.3)},
  ('B', 128): {
    'fastv': (71.3, 55.3, 68.7, 55.6, 70.0, 1344, 62.5, 26.5),
    'pyramiddrop': (73.7, 56.8, 69.5, 56.1, 77.9, 1422, 62.1, 27.1),
    'sparsevlm': (74.9, 57.0, 69.3, 56.0, 83.3, 1408, 62.2, 30.1),
    'prumerge_plus': (74.8, 58.0, 68.6, 54.3, 83.2, 1412, 62.0, 29.9),
    'visionzip': (75.5, 57.9, 68.9, 55.9, 84.8, 1424, 61.5, 31.3),
    'divprune': (76.0, 59.2, 68.2, 55.3, 86.8, 1405, 61.5, 30.6),
    'cdpruner': (76.2, 59.3, 69.0, 56.0, 87.3, 1431, 62.4, 32.1),
  },
  ('B', 64): {
    'fastv': (57.2, 48.0, 68.7, 52.1, 37.2, 992, 49.6, 20.1),
    'pyramiddrop': (58.1, 49.2, 68.3, 51.1, 40.1, 1004, 48.3, 19.7),
    'sparsevlm': (67.3, 51.5, 69.0, 52.5, 70.2, 1193, 58.0, 25.1),
    'prumerge_plus': (71.2, 55.1, 69.2, 52.1, 76.3, 1311, 59.2, 28.0),
    'visionzip': (72.1, 56.0, 69.0, 55.0, 77.9, 1362, 60.3, 29.0),
    'divprune': (74.1, 57.5, 68.0, 54.5, 85.5, 1356, 60.1, 28.1),
    'cdpruner': (75.0, 58.6, 68.1, 54.7, 87.0, 1399, 61.1, 29.5),
  },
}


@dataclasses.dataclass(frozen=True)
class Figure:
  """One published number: its lineage, a key of `LINEAGES`, and its value as printed."""

  lineage: str
  value: float


def figures(benchmark: str, method: str, budget: int) -> list[Figure]:
  """What is published of a method at a budget on a benchmark, one figure per lineage; mostly none."""
  found = []
  for (lineage, tokens), of_methods in TABLE.items():
    if tokens == budget and method in of_methods and benchmark in BENCHMARKS[lineage]:
      found.append(Figure(lineage, of_methods[method][BENCHMARKS[lineage].index(benchmark)]))
  return found
