"""`python -m eoframework.cli`: what `eo run --workers` starts its processes with."""

from eoframework.cli import main

main()
