"""A program for two processes: `relora train CONFIG`, rank 1 with an empty disk of its own."""

import os
import sys

from relora.cli import main

if __name__ == "__main__":
    other = [f"output_dir={sys.argv[1]}.other"] if os.environ["RANK"] == "1" else []
    sys.exit(main(["train", sys.argv[1], "training.per_device_batch_size=2", *other]))
