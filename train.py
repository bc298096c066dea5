"""Command line entry: `python train.py fit --config quickstart.yaml`."""

import sys

from app.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
