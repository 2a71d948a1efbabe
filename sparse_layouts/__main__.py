"""`python -m sparse_layouts demo | info | explain | bench | doctor`."""

from __future__ import annotations

import sys

from sparse_layouts.command_line.main import main

if __name__ == "__main__":
    sys.exit(main())
