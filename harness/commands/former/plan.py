"""`python -m harness.plan` is `harness plan` now.

In Python `harness.plan` is the function of `harness.api`. Python sets a package's attribute to a
submodule when it imports it; here that is the function itself.
"""

import sys
from typing import Any, cast

if __name__ == "__main__":
    from harness.commands.cli import program_formerly

    sys.exit(program_formerly("plan", "plan"))

from harness.api import plan

sys.modules[__name__] = cast(Any, plan)
