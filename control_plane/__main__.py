"""`python -m control_plane` is `sortline`."""

import sys

from control_plane.cli import main

sys.exit(main())
