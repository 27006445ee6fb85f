"""`python -m edgemoe`."""

from edgemoe.cli.main import main

main()
