"""What a user may ask of a plan."""

from edgemoe.rules.records import *  # noqa: F403
