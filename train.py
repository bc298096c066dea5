"""Command line entry: `python train.py fit --config quickstart.yaml`."""

import os
import sys

os.environ["MPLBACKEND"] = "Agg"  # plots are files; a notebook's backend may not exist here

from app.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
