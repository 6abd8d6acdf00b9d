"""`python -m fluxcanvas.web.host`: the same as the command `fluxcanvas`."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
