"""The measurements as plain values, as Markdown and as plots."""

from __future__ import annotations

import math
from itertools import groupby
from pathlib import Path

from . import ceilings, output
from .environment import environment, heading
from .measure import Measurement

Row = dict[str, object]
TICKS = (0.25, 0.5, 1, 2, 4, 8, 16, 32, 64, 128)  # of ratios


def row(measurement: Measurement, peers: list[Measurement], limits: dict[str, float]) -> Row:
    """One contender in plain values; ``ratios`` says how many times longer each of ``peers`` took."""
    case, seconds = measurement.case, measurement.seconds
    work = case.work(measurement.direction)
    share, bound = ceilings.share(limits, work, case.dtype, seconds)
    return {
        "case": case.name,
        "family": case.family,
        "model": case.model,
        "direction": measurement.direction,
        "contender": measurement.contender.name,
        "layout": measurement.contender.layout,
        "label": measurement.contender.label,
        "ours": measurement.contender.ours,
        "seconds": seconds,
        "quartiles": measurement.quartiles,
        "rounds": len(measurement.rounds),
        "error": measurement.error,
        "gbytes_per_s": work.bytes / seconds / 1e9,
        "gflops_per_s": work.flops / seconds / 1e9,
        "ceiling_share": share,
        "ceiling": bound,
        "ratios": {peer.contender.label: measurement.ratio(peer) for peer in peers if not math.isnan(peer.error)},
    }


def rows(results: list[Measurement], limits: dict[str, float]) -> list[Row]:
    """Rows of all contenders of one case and direction; ours are compared with the others."""
    peers = [result for result in results if not result.contender.ours]
    return [row(result, peers if result.contender.ours else [], limits) for result in results]


def as_json(table: list[Row], limits: dict[str, float], absent: dict[str, str]) -> dict[str, object]:
    return {"environment": environment(), "ceilings": limits, "missing_peers": absent, "rows": table}


def markdown(figures: dict[str, object]) -> str:
    """What :func:`as_json` holds.

    The environment, the ceilings, a table of the models, and one for every operator, dtype and direction with how far the
    fastest peer is behind.
    """
    parts, limits = heading(figures), figures["ceilings"]
    rates = {dtype: limits.get(f"{dtype}_gflops_per_s") for dtype in ceilings.DTYPES}
    products = ", ".join(f"{rate:.0f} GFLOP/s in {dtype}" for dtype, rate in rates.items() if rate)
    parts.append(
        f"Ceilings: a large copy moves {limits['copy_gbytes_per_s']:.1f} GB/s, a large matrix product makes {products}. "
        "The column \"ceiling\" is the share of the nearer one, of memory's (M) or arithmetic's (A; for bfloat16 the larger of "
        'both dtypes\'), "spread" the range of the middle half of the rounds over the median, ours and the widest of a peer.'
    )
    models = [r for r in figures["rows"] if r["model"] and r["direction"] == "forward"]
    if models:
        parts.append(f"### Models, ms\n\n{model_table(models)}")
    for title, group in groupby(figures["rows"], key=_title):
        parts.append(_section(title, list(group)))
    return "\n\n".join(parts)


def model_table(models: list[Row]) -> str:
    """Milliseconds of every contender (and dtype) for every model."""
    times: dict[tuple[str, str], dict[str, float]] = {}
    for r in models:
        name, _, dtype = r["case"].rpartition("/")
        times.setdefault((r["label"], dtype), {})[name] = r["seconds"] * 1e3
    names = list(dict.fromkeys(name for found in times.values() for name in found))
    lines = [
        [f"{label}, {dtype}", *(output.short(found[name]) if name in found else "" for name in names)]
        for (label, dtype), found in times.items()
    ]
    return output.table(["", *names], lines)


def plots(table: list[Row], folder: Path) -> None:
    """operators.png, how many times longer the fastest peer takes, and models.png, the time of every contender."""
    operators = [r for r in table if r["ours"] and r["ratios"] and not r["model"]]
    if operators:
        names = [f"{r['case']} {r['direction']} {r['label']}" for r in operators]
        leads = [min(r["ratios"].values()) for r in operators]

        def draw_operators(axis) -> None:
            axis.set_xscale("log")
            output.bars(axis, names, leads, [True] * len(leads), "time of the fastest peer / ours", start=1)
            low, high = min(1, *leads) / 2, max(1, *leads) * 2
            axis.set_xticks(ticks := [tick for tick in TICKS if low < tick < high], map(str, ticks))
            axis.minorticks_off()

        output.plot(folder / "operators.png", (10, 1.5 + 0.16 * len(names)), draw_operators)
    models = [list(group) for _, group in groupby((r for r in table if r["model"]), key=lambda r: r["case"])]
    if models:

        def draw_models(*axes) -> None:
            for axis, group in zip(axes, models, strict=True):
                labels, times = [r["label"] for r in group], [r["seconds"] * 1e3 for r in group]
                output.bars(axis, labels, times, [r["ours"] for r in group], "ms")
                axis.set_title(group[0]["case"], fontsize=8)

        columns = min(3, len(models))
        size = (5 * columns, 2 * -(-len(models) // columns))
        output.plot(folder / "models.png", size, draw_models, len(models), columns)


def _title(r: Row) -> str:
    return f"{r['family']}, {r['direction']}, {r['case'].rpartition('/')[2]}"


def _section(title: str, table: list[Row]) -> str:
    ours = [r for r in table if r["ours"]]
    peers = list(dict.fromkeys(label for r in ours for label in r["ratios"]))
    header = [
        "case",
        "ours",
        "ms",
        *peers,
        "fastest peer",
        "rounds",
        "spread",
        "error",
        "peers' error",
        "GB/s",
        "GFLOP/s",
        "ceiling",
    ]
    lines = []
    for r in ours:
        others = {p["label"]: p for p in table if p["case"] == r["case"] and not p["ours"]}
        cells = [f"{output.short(others[p]['seconds'] * 1e3)} ({r['ratios'][p]:.2f}x)" if p in others else "" for p in peers]
        worst = max((p["error"] for p in others.values()), key=lambda error: (math.isnan(error), error), default=0)
        spreads = [str(r["rounds"]), _spreads(r, list(others.values()))]
        errors = [f"{r['error']:.1e}", f"{worst:.1e}"]
        rates = [f"{r['gbytes_per_s']:.1f}", f"{r['gflops_per_s']:.0f}", f"{r['ceiling_share']:.2f} {r['ceiling'][0].upper()}"]
        lines.append([r["case"], r["label"], output.short(r["seconds"] * 1e3), *cells, _fastest(r), *spreads, *errors, *rates])
    parts = [f"### {title}", "", output.table(header, lines, text_columns=2)]
    leads = [min(r["ratios"].values()) for r in ours if r["ratios"]]
    if leads:
        parts += ["", f"The fastest peer takes {min(leads):.2f} to {max(leads):.2f} times as long as ours."]
    return "\n".join(parts)


def _spreads(r: Row, peers: list[Row]) -> str:
    """The range of the middle half of the rounds, as a part of the median: of ours, and the widest of the peers'."""
    own, *others = ((one["quartiles"][1] - one["quartiles"][0]) / one["seconds"] for one in (r, *peers))
    return f"{own:.0%}" + (f", {max(others):.0%}" if others else "")


def _fastest(r: Row) -> str:
    return f"{min(r['ratios'].values()):.2f}x" if r["ratios"] else ""
