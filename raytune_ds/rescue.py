"""What is done about workers that hang: the stack of every rank is kept, and those who hold up the others are ended."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime

from raytune_ds import nodes, stacks, storage
from raytune_ds.nodes import Delegates, Node, Silent
from raytune_ds.rundir import RunDir
from raytune_ds.stacks import Place

ANSWER_S = 60.0
"""That a node has to answer: a process has to start there, and each stack takes a few seconds at worst."""


def rescue(run: RunDir, culprits: Iterable[int], places: Mapping[int, Place]) -> str:
    """Writes the stacks of all workers of a run, and ends some of them, so that Ray Train starts the group anew.

    Args:
        run: its directory.
        culprits: the ranks to end.
        places: of all ranks.

    Returns:
        The folder of the stacks, or why there is none.
    """
    there = {node.id: node for node in nodes.alive()}
    by_node: dict[Node, dict[int, Place]] = {}
    for rank, place in places.items():
        if place.node in there:
            by_node.setdefault(there[place.node], {})[rank] = place
    folder = f"{run.hangs}/{datetime.now():%Y%m%d-%H%M%S}"
    with Delegates(list(by_node)) as delegates:
        answers = delegates.run_each(
            stacks.of_each, {node: (ranks,) for node, ranks in by_node.items()}, ANSWER_S
        )
        said = _write(folder, places, by_node, answers)
        ended = {
            node: ({rank: place for rank, place in ranks.items() if rank in set(culprits)},)
            for node, ranks in by_node.items()
        }
        delegates.run_each(stacks.kill_each, ended, ANSWER_S)
    return said


def _write(
    folder: str,
    places: Mapping[int, Place],
    by_node: Mapping[Node, Mapping[int, Place]],
    answers: Mapping[Node, dict[int, str] | Silent],
) -> str:
    texts = dict.fromkeys(places, "its node is gone\n")
    for node, answer in answers.items():
        if isinstance(answer, Silent):
            answer = dict.fromkeys(by_node[node], f"node {node.name}: {answer.reason}\n")
        texts |= answer
    try:
        for rank, text in texts.items():
            storage.write_bytes(f"{folder}/rank-{rank:05d}.txt", text.encode())
    except OSError as error:
        return f"their stacks can't be written: {error}"
    return f"the stacks of all workers are in {folder}"
