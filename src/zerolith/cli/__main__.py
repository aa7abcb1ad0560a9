"""`python -m zerolith.cli` is the `zerolith` command."""

import sys

from zerolith.cli import main

sys.exit(main())
