"""The planner for clusters: stall, cadence and goodput from 8 to 100,000 GPUs, from the figures of one node.

`figures` are the inputs, `stall_models` what a save costs, `renewal` the exact goodput, `young_daly` the approximations
in use, `simulation` the same run event by event, `measured` what result documents say, `planner` the rows, `document`
the result.
`docs/cluster-model.md` has the formulae.
"""

from __future__ import annotations

from .document import engines_of, figures_of, model_document
from .figures import Cluster, mtbf_gpu_hours
from .measured import Findings, findings
from .planner import SIZES, Row, plan, plan_row
from .renewal import Shares, Timing, best_cadence_seconds, best_interval_steps, goodput, shares
from .simulation import Simulated, simulate
from .stall_models import KINDS, Given, Measured, Modelled, StallModel, timing_of
from .young_daly import daly_first_order_seconds, daly_seconds, first_order_goodput, young_seconds

__all__ = [
    "KINDS",
    "SIZES",
    "Cluster",
    "Findings",
    "Given",
    "Measured",
    "Modelled",
    "Row",
    "Shares",
    "Simulated",
    "StallModel",
    "Timing",
    "best_cadence_seconds",
    "best_interval_steps",
    "daly_first_order_seconds",
    "daly_seconds",
    "engines_of",
    "figures_of",
    "findings",
    "first_order_goodput",
    "goodput",
    "model_document",
    "mtbf_gpu_hours",
    "plan",
    "plan_row",
    "shares",
    "simulate",
    "timing_of",
    "young_seconds",
]
