"""``python -m sadcl.train`` is ``sadcl train``."""

import sys

from sadcl.cli import main

sys.exit(main(["train", *sys.argv[1:]]))
