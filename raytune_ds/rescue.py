"""What is done about workers that hang: the stack of every rank is kept, and those who hold up the others are ended."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping
from datetime import datetime
from typing import Any

from raytune_ds import nodes, stacks, storage
from raytune_ds.nodes import Delegates, Node, Silent
from raytune_ds.rundir import RunDir
from raytune_ds.stacks import Place

ANSWER_S = 60.0
"""That a node has to answer: a process has to start there."""


def rescue(
    run: RunDir,
    places: Mapping[int, Place],
    condemned: Callable[[], Collection[int]],
    say: Callable[[str], None],
) -> None:
    """Asks all workers of a run for their stacks, ends some of them, so that Ray Train starts the group anew, and keeps
    the stacks; in this order, for storage may be what hangs.

    Args:
        run: its directory.
        places: of all ranks.
        condemned: the ranks to end, asked when all is ready for it; none where they have got on meanwhile.
        say: hears of the end of each, and where the stacks are.
    """
    by_node = _by_node(places)
    with Delegates(list(by_node)) as delegates:
        delegates.run(os.getpid, deadline_s=ANSWER_S)  # they are there then, and what follows takes seconds
        culprits = set(
            condemned()
        )  # before their stacks are asked for, which wakes up those that were stopped
        answers = delegates.run_each(stacks.of_each, _arguments(by_node, places), ANSWER_S)
        if culprits and not culprits & places.keys():
            culprits = set(places)  # one that never said where it is goes with the others
        if culprits:
            left = delegates.run_each(stacks.kill_each, _arguments(by_node, culprits), ANSWER_S)
            for node, alive in left.items():
                if alive:
                    said = alive.reason if isinstance(alive, Silent) else f"ranks {alive} are still there"
                    say(f"workers that hang can't be ended on node {node.name}: {said}")
        else:
            say("the workers get on again; none was ended")
    texts = _texts(places, by_node, answers)
    folder = f"{run.hangs}/{datetime.now():%Y%m%d-%H%M%S}"
    try:
        for rank, text in texts.items():
            storage.write_bytes(f"{folder}/rank-{rank:05d}.txt", text.encode())
    except OSError as error:
        say(f"the stacks of the workers can't be written: {error}")
        return
    say(f"the stacks of all workers are in {folder}")


def _by_node(places: Mapping[int, Place]) -> dict[Node, dict[int, Place]]:
    """The places on each node that is alive."""
    there = {node.id: node for node in nodes.alive()}
    by_node: dict[Node, dict[int, Place]] = {}
    for rank, place in places.items():
        if place.node in there:
            by_node.setdefault(there[place.node], {})[rank] = place
    return by_node


def _arguments(by_node: Mapping[Node, Mapping[int, Place]], ranks: Collection[int]) -> dict[Node, tuple[Any]]:
    return {
        node: ({rank: place for rank, place in there.items() if rank in ranks},)
        for node, there in by_node.items()
    }


def _texts(
    places: Mapping[int, Place],
    by_node: Mapping[Node, Mapping[int, Place]],
    answers: Mapping[Node, dict[int, str] | Silent],
) -> dict[int, str]:
    """What is known of each rank."""
    texts = dict.fromkeys(places, "its node is gone\n")
    for node, answer in answers.items():
        if isinstance(answer, Silent):
            answer = dict.fromkeys(by_node[node], f"node {node.name}: {answer.reason}\n")
        texts |= answer
    return texts
