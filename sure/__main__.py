"""`python -m sure` is the `sure` command."""

import sys

from sure.cli import main

sys.exit(main())
