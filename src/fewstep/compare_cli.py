"""fewstep compare: several runs in one table and on one page."""

from pathlib import Path
from typing import Any

import tyro


def compare(
    *runs: tyro.conf.Positional[Path], out: Path = Path("compare.html"), records: tuple[Path, ...] = ()
) -> dict[str, Any]:
    """One table and one HTML page over several runs: like with like only, curves by images seen and by time.

    Args:
        runs: Run directories, and folders of `fewstep combine`. Give the run that another began from too: its images count.
        out: The page.
        records: Files of what `fewstep evaluate` printed, for held-out numbers with their spread.
    """
    from fewstep.console import say
    from fewstep.report.compare import compare as carry_out
    from fewstep.report.standings import text

    found = carry_out(runs, out, records)
    say(f"{text(found.tables, found.contenders)}\n\n{found.verdict()}\npage: {out}")
    return found.to_json()
