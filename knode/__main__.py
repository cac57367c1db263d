"""`python -m knode` is the command line."""

import sys

from knode.cli.main import main

sys.exit(main())
