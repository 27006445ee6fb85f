"""The six records that the stages pass on: Model -> Stats -> Costs -> Plan -> Artifact -> Report."""

from edgemoe.ir.costs import *  # noqa: F403
