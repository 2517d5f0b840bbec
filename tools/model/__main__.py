"""``python -m model``: :mod:`model.report`."""

import sys

from model.report import main

sys.exit(main())
