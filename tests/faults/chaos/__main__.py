"""`make chaos N=20 SEED=0`: N scenarios one after the other, and a table of what they cost."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from raytune_ds.console import human_time, say, table
from tests.faults.chaos.play import Ending, calm, play
from tests.faults.chaos.scenarios import ENGINES, ROWS, Scenario, scenarios
from tests.helpers import write_jsonl

COLUMNS = ("seed", "engine", "killed", "at", "again", "back", "parts", "starts", "end")
LEGEND = (
    "at: the last step that was done; again: steps done again; back: from the kill to the end of the next step; parts: "
    "seconds until it was noticed + for new workers + for model and checkpoint + for the first step, of each restart "
    "that the last driver saw; starts: of the command; end: metrics.jsonl and the weights are those of a calm run to "
    "the bit (=), or the batches are and losses to 1e-5 (~), and verify proves it"
)


def main(arguments: list[str]) -> int:
    """0 if every run ended as a calm one does."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.chaos", description=__doc__)
    parser.add_argument("--number", type=int, default=20, help="of scenarios")
    parser.add_argument("--seed", type=int, default=0, help="of the first; the others count on from it")
    parser.add_argument("--storage", type=Path, default=None, help="where runs go; kept if something differs")
    given = parser.parse_args(arguments)
    storage = given.storage or Path(tempfile.mkdtemp(prefix="raytune-chaos-"))
    storage.mkdir(parents=True, exist_ok=True)
    rows = write_jsonl(storage / "rows.jsonl", ROWS)
    todo = scenarios(given.number, given.seed)
    started = time.monotonic()
    undisturbed = {}
    for engine in ENGINES:
        if any(scenario.engine == engine for scenario in todo):
            undisturbed[engine] = calm(engine, rows, storage)
            say(f"calm {engine}: {human_time(time.monotonic() - started)} so far")
    done: list[tuple[Scenario, Ending]] = []
    for number, scenario in enumerate(todo, 1):
        ending = play(scenario, rows, storage, undisturbed[scenario.engine])
        done.append((scenario, ending))
        left = (time.monotonic() - started) / number * (len(todo) - number)
        verdict = ending.problem or "equal"
        say(
            f"{number}/{len(todo)}  seed {scenario.seed}  {scenario.engine}: {scenario}: {verdict}  "
            f"({human_time(left)} left)"
        )
    good = sum(not ending.problem for _, ending in done)
    table(f"{good} of {len(done)} runs ended as undisturbed ones", COLUMNS, [_line(*pair) for pair in done])
    say(LEGEND)
    say(f"runs and their logs: {storage}; {human_time(time.monotonic() - started)}")
    return int(good < len(done))


def _line(scenario: Scenario, ending: Ending) -> list[object]:
    return [
        scenario.seed,
        scenario.engine,
        scenario,
        "-" if ending.struck is None else ending.struck.step,
        "-" if ending.again is None else ending.again,
        "-" if ending.back_s is None else human_time(ending.back_s),
        ending.parts or "-",
        ending.starts,
        ending.problem or ("~" if scenario.elastic else "="),
    ]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
