"""`python -m fastkto`, and `accelerate launch -m fastkto`, are the command `fastkto`."""

import sys

from fastkto.cli import main

sys.exit(main())
