"""The directory of a sweep.

sweep.json        the resolved config it was begun with, its space included
journal.jsonl     what was suggested, reported and decided, in order
trials/0001/      a run directory for each trial
leaderboard.csv   the trials, the best first
best.yaml         the best trial's config, for `python -m raytune_ds.train --config`
report.html       all of it, to look at
promoted/0007/    the run that a trial was promoted to; 0007-anew where it was trained from the start
"""

from __future__ import annotations

from dataclasses import dataclass

from raytune_ds.rundir import RunDir
from raytune_ds.sweep.records import trial_name


@dataclass(frozen=True)
class SweepDir:
    """Paths of one sweep, on any filesystem pyarrow opens."""

    path: str

    @property
    def name(self) -> str:
        """Of the sweep."""
        return self.path.rpartition("/")[2]

    @property
    def config(self) -> str:
        """The resolved config."""
        return f"{self.path}/sweep.json"

    @property
    def journal(self) -> str:
        """What was decided."""
        return f"{self.path}/journal.jsonl"

    @property
    def driver(self) -> str:
        """Who runs it, while it runs."""
        return f"{self.path}/driver.json"

    @property
    def tune(self) -> str:
        """Ray Tune's own notes, which nobody reads."""
        return f"{self.path}/.tune"

    @property
    def leaderboard(self) -> str:
        """The trials as a table."""
        return f"{self.path}/leaderboard.csv"

    @property
    def best(self) -> str:
        """The best trial's config."""
        return f"{self.path}/best.yaml"

    @property
    def report(self) -> str:
        """The page."""
        return f"{self.path}/report.html"

    def promoted(self, number: int, anew: bool) -> RunDir:
        """The run that a trial was promoted to."""
        return RunDir(f"{self.path}/promoted/{trial_name(number)}{'-anew' * anew}")

    def trial(self, number: int, origin: str | None = None) -> RunDir:
        """The run of a trial; `origin` names the checkpoint it was begun from, where that was another trial's."""
        return RunDir(f"{self.path}/trials/{trial_name(number)}{f'-from-{origin}' if origin else ''}")
