"""The six records that the stages pass on: Model -> Stats -> Costs -> Plan -> Artifact -> Report.

Every record is made by one stage and never changed after.  base/storage.py saves them and opens them again.
Sizes are bytes, costs are nats of KL(original || compressed) per token, counts are tokens.
"""

from edgemoe.ir.costs import Costs, Unit
from edgemoe.ir.model import PROJECTIONS, Model, Router, Tensor, is_stack, tensor_name
from edgemoe.ir.plan import CountBound, Plan, RuleUse, counts_text
from edgemoe.ir.report import Artifact, ArtifactFile, Report, Round, TextScore
from edgemoe.ir.stats import Domain, Probe, Stats

__all__ = [
    "PROJECTIONS",
    "Artifact",
    "ArtifactFile",
    "Costs",
    "CountBound",
    "Domain",
    "Model",
    "Plan",
    "Probe",
    "Report",
    "Round",
    "Router",
    "RuleUse",
    "Stats",
    "Tensor",
    "TextScore",
    "Unit",
    "counts_text",
    "is_stack",
    "tensor_name",
]
