"""The measurements as a Markdown table and as JSON."""

from __future__ import annotations

import platform
from itertools import groupby
from pathlib import Path

import torch

import segnext_kernels

from .measure import Measurement


def environment() -> dict[str, object]:
    """What the figures depend on: processor, threads, instruction set, versions."""
    info = segnext_kernels.build_info()
    return {
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "isa": info["isa"],
        "torch": torch.__version__,
        "python": platform.python_version(),
        "compiler": info["compiler"],
        "segnext_kernels": info["version"],
        "missing": info["missing"],
    }


def processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    names = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")] if cpuinfo.exists() else []
    return names[0].partition(":")[2].strip() if names else platform.processor() or platform.machine()


def row(measurement: Measurement, peers: list[Measurement]) -> dict[str, object]:
    """One contender in plain values; ``ratios`` says how many times longer each of ``peers`` took."""
    case, seconds = measurement.case, measurement.seconds
    work = case.work[measurement.direction]
    return {
        "case": case.name,
        "direction": measurement.direction,
        "contender": measurement.contender.name,
        "layout": measurement.contender.layout,
        "ours": measurement.contender.ours,
        "seconds": seconds,
        "rounds": len(measurement.rounds),
        "error": measurement.error,
        "gbytes_per_s": work.bytes / seconds / 1e9,
        "gflops_per_s": work.flops / seconds / 1e9,
        "ratios": {peer.contender.label: measurement.ratio(peer) for peer in peers},
    }


def rows(results: list[Measurement]) -> list[dict[str, object]]:
    """Rows of all contenders of one case and direction; ours are compared with the others."""
    peers = [result for result in results if not result.contender.ours]
    return [row(result, peers if result.contender.ours else []) for result in results]


def as_json(table: list[dict[str, object]]) -> dict[str, object]:
    return {"environment": environment(), "rows": table}


def markdown(table: list[dict[str, object]]) -> str:
    """The environment, a table for every operator, dtype and direction, and how far the fastest peer is behind in each."""
    facts = "; ".join(f"{key} {value}" for key, value in environment().items() if value and key != "missing")
    parts = [facts, *(f"no {backend}: {why}" for backend, why in environment()["missing"].items())]
    for title, group in groupby(table, key=_title):
        parts.append(_section(title, list(group)))
    return "\n\n".join(parts)


def _title(r: dict[str, object]) -> str:
    operator, _, dtype = r["case"].split("/")
    return f"{operator}, {r['direction']}, {dtype}"


def _section(title: str, table: list[dict[str, object]]) -> str:
    ours = [r for r in table if r["ours"]]
    peers = list(dict.fromkeys(label for r in ours for label in r["ratios"]))
    header = ["case", "layout", "ms", *peers, "fastest peer", "error", "peers' error", "GB/s", "GFLOP/s"]
    lines = [f"### {title}", "", _line(header), _line(["---"] * 2 + ["---:"] * (len(header) - 2))]
    for r in ours:
        others = {f"{p['contender']} {p['layout']}": p for p in table if p["case"] == r["case"] and not p["ours"]}
        cells = [f"{others[p]['seconds'] * 1e3:.3g} ({r['ratios'][p]:.2f}x)" if p in others else "" for p in peers]
        errors = [f"{r['error']:.1e}", f"{max((p['error'] for p in others.values()), default=0):.1e}"]
        rates = [f"{r['gbytes_per_s']:.1f}", f"{r['gflops_per_s']:.0f}"]
        lines.append(_line([r["case"], r["layout"], f"{r['seconds'] * 1e3:.3g}", *cells, _fastest(r), *errors, *rates]))
    leads = [min(r["ratios"].values()) for r in ours if r["ratios"]]
    if leads:
        lines += ["", f"The fastest peer takes {min(leads):.2f} to {max(leads):.2f} times as long as ours."]
    return "\n".join(lines)


def _fastest(r: dict[str, object]) -> str:
    return f"{min(r['ratios'].values()):.2f}x" if r["ratios"] else ""


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
