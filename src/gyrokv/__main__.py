"""``python -m gyrokv`` is the ``gyrokv`` command."""

import sys

from .cli import main

sys.exit(main())
