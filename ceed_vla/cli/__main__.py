"""`python -m ceed_vla.cli`, for launchers that start modules."""

import sys

from ceed_vla.cli.entry import main

sys.exit(main())
