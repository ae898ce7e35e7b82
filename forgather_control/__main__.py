"""``python -m forgather_control VERB ...``, the same as ``forgather control VERB ...``."""

import sys

from .cli import main

sys.exit(main())
