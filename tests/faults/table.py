"""The faults. Each is a mistake of an ordinary day, and names the tests that are there to notice it."""

from __future__ import annotations

from tests.faults.compiler import COMPILER
from tests.faults.masks import MASKS
from tests.faults.runner import Fault
from tests.faults.runtime import RUNTIME
from tests.faults.statistics import STATISTICS
from tests.faults.surface import SURFACE

FAULTS: tuple[Fault, ...] = (*COMPILER, *MASKS, *RUNTIME, *STATISTICS, *SURFACE)
