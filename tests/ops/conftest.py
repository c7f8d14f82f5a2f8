"""Puts the repository on the path, so that tests can say `from tests.ops.evaluate import evaluate`."""

import sys
from pathlib import Path

ROOT = str(Path(__file__).parents[2])
if ROOT not in sys.path:
    sys.path.insert(0, ROOT)
