"""What the nodes of a cluster have to have in common."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from raytune_ds.doctor.finding import Finding
from raytune_ds.doctor.versions import PACKAGES, comparable

Findings = Mapping[str, Sequence[Finding]]
"""By node."""

MUST_AGREE = ("python", *PACKAGES)


def differing(values: Mapping[str, str]) -> dict[str, str]:
    """The nodes whose value is not that of most; of two that are as frequent the first node's counts.

    Args:
        values: by node.
    """
    counts = Counter(map(comparable, values.values()))
    usual = counts.most_common(1)[0][0] if counts else None
    return {node: value for node, value in values.items() if comparable(value) != usual}


def judged(findings: Findings) -> dict[str, list[Finding]]:
    """The same findings, red where a version is not that of the other nodes, yellow where only some have a token."""
    judged = {node: list(of_node) for node, of_node in findings.items()}
    for name in (*MUST_AGREE, "hub token"):
        at = {
            node: index
            for node, of_node in judged.items()
            for index, finding in enumerate(of_node)
            if finding.name == name
        }
        for node in differing({node: judged[node][index].found for node, index in at.items()}):
            judged[node][at[node]] = _as_odd(judged[node][at[node]])
    return judged


def _as_odd(finding: Finding) -> Finding:
    if finding.name == "hub token":
        return replace(
            finding, status="warn", advice="other nodes differ: set HF_TOKEN on all of them, or on none"
        )
    return replace(finding, status="bad", advice="other nodes have another: install the same on all of them")
