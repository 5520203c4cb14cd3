"""The simulator: how much faster than dense attention a spec can be, before anything runs. Imports neither torch nor triton."""

from __future__ import annotations

from attncc.simulator.levels import simulate
from attncc.simulator.many import Candidate, simulate_many
from attncc.simulator.predict import Prediction
from attncc.simulator.report import SpeedupReport, TileCounts

__all__ = ["Candidate", "Prediction", "SpeedupReport", "TileCounts", "simulate", "simulate_many"]
