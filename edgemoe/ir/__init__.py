"""This package defines the six records that the stages pass on: Model, Stats, Costs, Plan, Artifact and Report.

One stage makes each record, and no stage changes it afterwards.  base/storage.py saves the records and opens them again.
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
