"""Lets the tests import the toy stage that their worker processes use as well."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
