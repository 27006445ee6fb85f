"""`python -m edgemoe`."""

from edgemoe.cli import main

main()
