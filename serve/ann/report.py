"""What was measured when an index was chosen, as a table and as a picture."""

from __future__ import annotations

from pathlib import Path

from serve.ann.choice import IndexLimits, Measured, Report, knee


def table(report: Report, limits: IndexLimits) -> str:
    """The best setting of each kind, on the sample and on all rows. Empty if nothing was measured."""
    if report.chosen is None:
        return ""
    lines = [f"{'':10} {'recall@10':>9} {'ms':>8} {'MB':>8} {'build s':>8}  method"]
    lines += [_line("sample", knee(swept, limits)) for swept in report.sample]
    lines += [_line("all rows", knee(swept, limits)) for swept in report.tuned]
    return "\n".join([*lines, _line("chosen", report.chosen)])


def _line(where: str, one: Measured) -> str:
    return f"{where:10} {one.recall:9.4f} {one.latency_ms:8.3f} {one.bytes / 1e6:8.1f} {one.build_s:8.1f}  {one.method}"


def draw(report: Report, limits: IndexLimits, path: Path) -> None:
    """Recall against latency: dashed on the sample, solid on all rows, the limits and what was chosen."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # heavy, and not every process chooses
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for style, curves in (("--", report.sample), ("-", report.tuned)):
        for swept in curves:
            label = swept[0].method.key + (" (sample)" if style == "--" else "")
            axes.plot([one.latency_ms for one in swept], [one.recall for one in swept], f"{style}.", label=label, linewidth=1)
    if report.chosen is not None:
        axes.plot(report.chosen.latency_ms, report.chosen.recall, "k*", markersize=14, label="chosen")
    axes.axhline(limits.recall, color="grey", linewidth=0.8)
    axes.set(xscale="log", xlabel="median search of one query on one core, ms", ylabel="recall@10")
    axes.legend(fontsize="small")
    FigureCanvasAgg(figure).print_png(path)  # type: ignore[no-untyped-call]
