"""`python -m relora` is the same program as `relora`."""

import sys

from relora.cli import main

if __name__ == "__main__":
    sys.exit(main())
