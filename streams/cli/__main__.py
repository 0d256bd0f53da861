"""`python -m streams.cli`: the same as `streamveil`."""

import sys

from streams.cli.main import main

sys.exit(main())
