"""`python -m duologue.cli` is the command `duologue`."""

import sys

from duologue.cli import main

sys.exit(main())
