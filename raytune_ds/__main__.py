"""`python -m raytune_ds VERB`."""

import sys

from raytune_ds.cli import main

if __name__ == "__main__":
    sys.exit(main())
