"""A figure of ours beside the one that the literature reports for the same network."""

from __future__ import annotations

from typing import Any, TypeAlias

from serve.contract import Manifest

Network: TypeAlias = tuple[Any, ...]
"""Layers of the projection head, depth, width, selective kernels."""


def network_of(manifest: Manifest) -> Network:
    """What references are looked up by."""
    facts: dict[str, Any] = manifest.training
    return (facts.get("head_layers", 2), facts.get("arch"), facts.get("width"), bool(facts.get("sk", False)))


def compare(share: float | None, reference: float | None, source: str, findings: list[str]) -> dict[str, Any]:
    """Plain JSON: what differs from the literature's data, its figure in per cent if there is one, the difference in points."""
    return {
        "differs": findings,
        "reference": reference,
        "reference_source": source,
        "difference_points": None if share is None or reference is None else 100 * share - reference,
    }


def comparison_lines(report: dict[str, Any], what: str) -> list[str]:
    """What `compare` found, in words; nothing for a report without a comparison."""
    lines = [f"differs from the literature: {finding}" for finding in report.get("differs", ())]
    if report.get("difference_points") is not None:
        comparable = "" if not report["differs"] else ", not comparable"
        lines.append(
            f"{what} there: {report['reference']} % ({report['reference_source']}); "
            f"difference {report['difference_points']:+.1f} points{comparable}"
        )
    elif "reference" in report:
        lines.append(f"no {what} of this network is known to us ({report['reference_source']})")
    return lines
