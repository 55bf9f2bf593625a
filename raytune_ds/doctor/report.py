"""The doctor's table, and the same for machines."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict

from raytune_ds.compatible import matrix
from raytune_ds.console import say, table
from raytune_ds.doctor.finding import Finding

STYLES = {"ok": None, "warn": "yellow", "bad": "red", "absent": "dim"}
EXIT_BAD = 2


def exit_code(findings: Mapping[str, Sequence[Finding]]) -> int:
    """0, or 2 where anything is red."""
    return EXIT_BAD if any(f.status == "bad" for of_node in findings.values() for f in of_node) else 0


def as_json(findings: Mapping[str, Sequence[Finding]]) -> str:
    """One object: `ok`, of each node its findings, and what goes with what."""
    nodes = {node: [asdict(finding) for finding in of_node] for node, of_node in findings.items()}
    columns, rows, notes = matrix()
    goes_with = {row[0]: dict(zip(columns[1:], row[1:], strict=True)) for row in rows}
    told = {
        "ok": exit_code(findings) == 0,
        "nodes": nodes,
        "goes_with": goes_with,
        "notes": notes,
    }
    return json.dumps(told, indent=2, ensure_ascii=False)


def show(findings: Mapping[str, Sequence[Finding]]) -> None:
    """A table; nodes with the same finding share a line."""
    rows = rows_of(findings)
    lines = [
        (nodes, f.name, "" if f.status == "absent" else f.status, f.found, f.advice) for nodes, f in rows
    ]
    styles = [STYLES[finding.status] for _, finding in rows]
    table("doctor", ["node", "check", "", "found", "what to do"], lines, styles)
    counts = {status: sum(f.status == status for _, f in rows) for status in ("bad", "warn")}
    if any(counts.values()):
        say(f"{counts['bad']} to mend, {counts['warn']} to know of")
    else:
        say("nothing to mend")


def show_matrix() -> None:
    """What goes with what, and why the rest does not."""
    columns, rows, notes = matrix()
    table("what goes with what", columns, rows)
    for note in notes:
        say(note, style="dim")


def rows_of(findings: Mapping[str, Sequence[Finding]]) -> list[tuple[str, Finding]]:
    """(nodes, finding) in the order of the checks; equal findings of several nodes once."""
    order = list(dict.fromkeys(f.name for of_node in findings.values() for f in of_node))
    shared: dict[Finding, list[str]] = {}
    for node, of_node in findings.items():
        for finding in of_node:
            shared.setdefault(finding, []).append(node)
    rows = sorted(shared.items(), key=lambda row: order.index(row[0].name))
    return [(_names(nodes, len(findings)), finding) for finding, nodes in rows]


def _names(nodes: Sequence[str], of: int) -> str:
    return f"all {of}" if len(nodes) == of > 1 else ", ".join(nodes)
