"""What training added to the weights of finished runs.

    harness anatomy outputs/main_seeds                    # every finished run
    harness anatomy outputs/main_seeds/RUN_NAME           # one run
    harness anatomy outputs/main_seeds intruder_k=20      # settings of conf/anatomy.yaml

Tables on the terminal and in FOLDER/anatomy: summary.csv over seeds, weights.parquet with a row for
every weight of every run, layers.parquet, overlap.parquet. Nothing is trained. Exit status 2 for
what has no change of weights to look at.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from harness.artifacts.anatomy import settings, summary, survey
from harness.system.console import quiet_command


@quiet_command
def main(arguments: list[str]) -> int:
    """The command line; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="harness anatomy",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="outputs/EXPERIMENT or outputs/EXPERIMENT/RUN")
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="of conf/anatomy.yaml")
    args = parser.parse_args(arguments)
    chosen = settings.read(args.settings)
    surveyed = survey.survey(args.folder, chosen, survey.progress)
    out = survey.write(surveyed, args.folder)
    table = summary.summarise(surveyed, args.folder)
    summary.write(table, args.folder)
    summary.show(table, surveyed, chosen)
    for name, why in surveyed.left_out.items():
        print(f"left out: {name} ({why})")
    print(f"saved in {out}: summary.csv, weights.parquet, layers.parquet, overlap.parquet")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
