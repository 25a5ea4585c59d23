"""`python -m echox` is the `echox` program."""

import sys

from echox.cli import main

sys.exit(main())
