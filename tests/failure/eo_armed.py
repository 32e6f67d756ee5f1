"""`eo` that kills or freezes itself where CRASH_AT or FREEZE_AT says (tests/crash.py)."""

import sys

from eoframework.cli import invoke
from tests.crash import arm_from_environment

if __name__ == "__main__":
    arm_from_environment()
    sys.exit(invoke(sys.argv[1:]))
