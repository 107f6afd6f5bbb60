"""`python -m edge_agent` is `sortline-agent`."""

import sys

from edge_agent.cli.commands import main

sys.exit(main())
