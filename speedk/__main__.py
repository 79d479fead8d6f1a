"""`python -m speedk`, the command line without its script."""

import sys

from speedk.cli import main

sys.exit(main())
