"""``python -m rt_ris.cli`` is ``rt-ris``."""

import sys

from rt_ris.cli import main

sys.exit(main())
