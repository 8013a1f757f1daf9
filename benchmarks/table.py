"""Print the README's tables from benchmark files: `python benchmarks/table.py KIND FILE...`, KIND of `TABLES`.

Only a grid of clusters may be of several files, each of one machine.

`tests/test_readme.py` holds the README to exactly this output for the committed results.
"""

import json
import sys
from pathlib import Path
from typing import Any

from anabranch.cli.cluster_verdict import verdict

POLICIES = ("transformers", "static", "least_loaded", "exact", "bounded")


def balance_table(result: dict[str, Any], ranks: int) -> str:
    """Speed over transformers' all_to_all and percent of the ideal, by workload."""
    rows = [row for row in result["rows"] if row["ranks"] == ranks]
    found = {(row["workload"], row["policy"]): row for row in rows}
    lines = [
        "| workload | max/mean | static (ours) | least_loaded | exact | **bounded** | ideal "
        "| bounded, % of ideal | guests |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for workload in dict.fromkeys(row["workload"] for row in rows):
        of = {policy: found[workload, policy] for policy in (*POLICIES, "ideal")}
        shown = [f"{of[p]['speedup_vs_transformers']:.2f}" for p in ("static", "least_loaded", "exact")]
        best = of["bounded"]
        lines.append(
            f"| {workload} | {best['max_mean_before']:.2f} | {' | '.join(shown)} | "
            f"**{best['speedup_vs_transformers']:.2f}** | {of['ideal']['speedup_vs_transformers']:.2f} | "
            f"{best['percent_of_ideal']:.1f} | {best['guests']} |"
        )
    return "\n".join(lines)


def planner_table(result: dict[str, Any]) -> str:
    """Microseconds of one plan, by size and load."""
    lines = ["| ranks | experts | load | exact, us | bounded, us |", "|---|---|---|---|---|"]
    found = {(r["ranks"], r["experts"], r["workload"], r["planner"]): r for r in result["rows"]}
    for ranks, experts, workload, planner in found:
        if planner == "exact":
            exact, bounded = (
                found[ranks, experts, workload, p]["plan_us_median"] for p in ("exact", "bounded")
            )
            lines.append(f"| {ranks} | {experts} | {workload} | {exact:.0f} | {bounded:.0f} |")
    return "\n".join(lines)


def validation_table(result: dict[str, Any]) -> str:
    """Errors on published runs that the model has not seen, beside simpler models and harder questions."""
    summary = result["summary"]
    lines = [
        "| predicted by | mean error, % | median, % | 90 of 100 below, % | in the 90 % interval |",
        "|---|---|---|---|---|",
    ]
    rows = {
        "**the calibrated model**": summary,
        "the same, no run of the same model seen": summary["leave_one_model_out"],
        "the same, no run on the same chip seen": summary["leave_one_hardware_out"],
        "one utilisation for all": summary["baselines"]["constant_mfu"],
    }
    for name, row in rows.items():
        covered = f"{row['coverage90']:.0%}" if "coverage90" in row else ""
        lines.append(
            f"| {name} | {row['mape_pct']:.1f} | {row['median_pct']:.1f} | {row['p90_pct']:.1f} | {covered} |"
        )
    return "\n".join(lines)


def memory_table(result: dict[str, Any]) -> str:
    """Peaks of real trainings, and their parts, measured / predicted in MB."""
    parts = ("peak", "state", "logits", "rest")
    lines = [f"| run | ranks | {' | '.join(parts)} | error, % |", "|---|---|" + "---|" * 5]
    for row in result["rows"]:
        assert row["state_exact"]
        shown = " | ".join(f"{measured:.1f} / {predicted:.1f}" for measured, predicted in map(row.get, parts))
        lines.append(f"| {row['run']} | {row['ranks']} | {shown} | {row['error_pct']:+.1f} |")
    return "\n".join(lines)


def published_memory_table(result: dict[str, Any]) -> str:
    """Published peaks of other frameworks, measured / predicted in GB."""
    lines = ["| run | software | model | chips | peak | error, % |", "|---|---|---|---|---|---|"]
    for row in result["published"]:
        about = " | ".join(str(row[name]) for name in ("id", "software", "model", "chips"))
        lines.append("| {} | {:.1f} / {:.1f} | {:+.0f} |".format(about, *row["peak"], row["error_pct"]))
    return "\n".join(lines)


def cluster_table(*results: dict[str, Any]) -> str:
    """What `auto` does beside transformers and the best fixed choice: a line for each lab, and the whole grid."""
    rows = [row for result in results for row in result["rows"]]
    lines = [
        "| nodes x ranks | between nodes, Mbit/s | cells | of transformers' time, worst "
        "| of the best fixed choice's, worst | speed-up, median where max/mean >= 1.5 | prediction error, median, % |",
        "|---|---|---|---|---|---|---|",
    ]
    found = {(row["topology"], row["inter_mbit"]) for row in rows}
    labs = sorted(found, key=lambda lab: (lab[0], lab[1] or 1e9))
    named = {(shape, f"{mbit:,.0f}" if mbit else "unshaped"): (shape, mbit) for shape, mbit in labs}
    for (shape, link), lab in {**named, ("**all**", ""): None}.items():
        told = verdict([r for r in rows if lab in (None, (r["topology"], r["inter_mbit"]))])
        worst = f"{told.worst_vs_transformers:.2f} | {told.worst_vs_best_fixed:.2f}"
        lines.append(
            f"| {shape} | {link} | {told.cells} | {worst} | {told.median_speedup:.2f} | "
            f"{100 * told.prediction_error:.1f} |"
        )
    return "\n".join(lines)


def codecs_table(result: dict[str, Any]) -> str:
    """What each wire codec does to the loss after a training, and to one gradient."""
    lines = [
        "| there | back | loss, % | 95 % interval, +- | relative error of a gradient |",
        "|---|---|---|---|---|",
    ]
    for row in result["summary"]:
        name = "none, by `all_to_all`" if row["dispatch_wire"] == "none" else row["dispatch_wire"]
        lines.append(
            f"| {name} | {row['combine_wire']} | {row['mean_change_percent']:+.2f} | {row['margin_percent']:.2f} | "
            f"{row['gradient_relative_error']:.1e} |"
        )
    return "\n".join(lines)


def generate_table(result: dict[str, Any]) -> str:
    """Tokens a second of the model with random weights, and how many times those of the other engines in the file that
    is. Where one has no int8, ours is beside its bf16."""
    measured = {row["engine"] for row in result["rows"]}
    known = {
        "transformers": "transformers",
        "generate_batch": "transformers_batch",
        "vLLM": "vllm",
        "llama.cpp": "llama_cpp",
    }
    others = {name: engine for name, engine in known.items() if engine in measured}
    heads = (
        "weights",
        "prompt",
        "chains",
        "samples",
        "tokens/s",
        "of the roof",
        *(f"over {name}" for name in others),
    )
    lines = [
        f"| {' | '.join(heads)} |",
        "|" + "---|" * len(heads),
    ]
    rows = [row for row in result["rows"] if row["model"] == "random" and row["kv_dtype"] != "int8"]
    keys = ("dtype", "prompt_tokens", "batch", "samples")
    usual = [row for row in rows if row["new_tokens"] < 1024]
    found = {(row["engine"], *(row[key] for key in keys)): row["tokens_per_s"] for row in usual}
    for row in sorted(usual, key=lambda row: tuple(row[key] for key in keys)):
        if row["engine"] == "anabranch":
            dtype, *size = (row[key] for key in keys)
            theirs = [
                found.get((engine, dtype, *size))
                or (dtype == "int8" and found.get((engine, "bfloat16", *size)))
                for engine in others.values()
            ]
            ratios = " | ".join(f"{row['tokens_per_s'] / rate:.2f}" if rate else "" for rate in theirs)
            what = " | ".join(map(str, (dtype, *size)))
            lines.append(f"| {what} | {row['tokens_per_s']:,.0f} | {row['roof_fraction']:.0%} | {ratios} |")
    return "\n".join(lines)


def long_chains_table(result: dict[str, Any]) -> str:
    """Problems solved, and chains that 2 GiB hold, under each way to keep keys and values."""
    lines = [
        "| keys and values | solved | points lost | lost, won | chains in 2 GiB | times bf16's | with open pages |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['policy']} | {row['solve_rate']:.1%} | {row['points_lost']:.1f} | {row['lost']}, {row['won']} "
        f"| {row['chains_in_2_gib']:,} | {row['chains_ratio']:.2f} | {row['chains_ratio_with_open_pages']:.2f} |"
        for row in result["rows"]
    ]
    return "\n".join(lines)


def machine_line(result: dict[str, Any]) -> str:
    """Where a result was measured."""
    m = result["machine"]
    versions = [f"{name} {m[name]}" for name in ("torch", "transformers") if name in m]
    return ", ".join([m.get("cpu") or m["processor"], f"{m['cores']} cores", *versions])


TABLES = {
    "balance": lambda result: balance_table(result, 2),
    "cluster": cluster_table,
    "codecs": codecs_table,
    "generate": generate_table,
    "long_chains": long_chains_table,
    "planner": planner_table,
    "validation": validation_table,
    "memory": memory_table,
    "published_memory": published_memory_table,
}


def tables(kind: str, *files: Path) -> str:
    return TABLES[kind](*(json.loads(file.read_text()) for file in files))


if __name__ == "__main__":
    given = [Path(name) for name in sys.argv[2:]]
    print("\n".join(dict.fromkeys(machine_line(json.loads(file.read_text())) for file in given)))
    print(tables(sys.argv[1], *given))
