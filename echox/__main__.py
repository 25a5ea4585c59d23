"""`python -m echox`: runs the `echox` program."""

import sys

from echox.cli import main

sys.exit(main())
