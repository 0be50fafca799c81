"""``python -m d2moe_ext.cli``: the command ``d2moe`` where its script is not on the path."""

import sys

from d2moe_ext.cli import main

sys.exit(main())
