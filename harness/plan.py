"""`python -m harness.plan`: the command of `harness.planning`.

In Python `harness.plan` is the function of `harness.api`. Python sets a package's attribute to a
submodule when it imports it; here that is the function itself.
"""

import sys
from typing import Any, cast

if __name__ == "__main__":
    from harness import planning
    from harness.console import ended

    sys.exit(ended(lambda: planning.main(sys.argv[1:])))

from harness.api import plan

sys.modules[__name__] = cast(Any, plan)
