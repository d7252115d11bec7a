"""Lets scripts beside it find the package of this checkout; they import it first. Not for those that run other checkouts too."""

import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
