"""`python -m gemstill`, which is also how torchrun starts it: `torchrun -m gemstill train recipe.yaml`."""

import sys

from gemstill.cli import main

sys.exit(main())
