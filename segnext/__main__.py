"""``python -m segnext`` is the ``segnext`` command."""

import sys

from .cli import main

sys.exit(main())
