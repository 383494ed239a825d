"""What a pipeline run promised, and whether it kept it: one table, for the page and for the terminal."""

from __future__ import annotations

from typing import Any, NamedTuple

from jaxalign.report.read import dig, number, policies, show

RATIO = 1.03  # of the pretraining NLL to the entropy of the world that wrote the corpus
REWARD_SLACK = 0.02  # below the accuracy of the gold reward itself: the labels are noisy
WIN_RATE, KL = 0.70, 10.0  # against SFT; nats per answer
SECONDS, MEBIBYTES = 360.0, 3072.0
ROAD = {"pretrain", "reward", "ppo", "dpo"}  # the stages that these were set for


class Verdict(NamedTuple):
    what: str
    value: str
    target: str
    detail: str
    passed: bool | None  # None: not measured


def verdicts(evaluation: Any) -> list[Verdict]:
    """One row per target. Missing figures give rows that say so; NaN passes nothing. A pipeline without a world that knows the
    truth, or without one of the stages of `ROAD`, has no targets, only the figures of its stages."""
    if not isinstance(evaluation, dict):
        return []
    named = evaluation.get("stages")  # of older runs, those that have figures
    stages = set(map(str, named)) if isinstance(named, list) else {*evaluation, *policies(evaluation)}
    if evaluation.get("world", "") is None or not stages >= ROAD:
        return _figures(evaluation)

    def get(*keys):
        return number(dig(evaluation, *keys))

    def row(what, value, limit, sign, unit="", detail="", digits=4):
        passed = None if value is None or limit is None else value <= limit if sign == "≤" else value >= limit
        unit = f" {unit}" if unit else ""
        target = f"{sign} {round(limit, 4):g}{unit}" if limit is not None else "unknown"
        return Verdict(what, "not measured" if value is None else show(value, digits) + unit, target, detail, passed)

    nll, floor, ratio = get("pretrain", "nll"), get("pretrain", "floor"), get("pretrain", "ratio")
    if ratio is None and nll is not None and floor:
        ratio = nll / floor
    accuracy, gold = get("reward", "accuracy"), get("reward", "gold_accuracy")
    out = [
        row("Pretraining NLL / entropy floor", ratio, RATIO, "≤", detail="" if nll is None else f"{show(nll)} against {show(floor)} nats per token"),
        row(
            "Reward model accuracy", accuracy, None if gold is None else gold - REWARD_SLACK, "≥", digits=3,
            detail=" · ".join(x for x in (interval(dig(evaluation, "reward", "interval")), gold is not None and f"the gold reward itself has {show(gold, 3)}") if x),
        ),
    ]  # fmt: skip
    for name in ("ppo", "dpo"):
        policy = dig(evaluation, "policies", name)
        rate, kl = number(dig(policy, "win_rate")), number(dig(policy, "kl"))
        out.append(row(f"{name.upper()} win rate against SFT", rate, WIN_RATE, "≥", detail=interval(dig(policy, "win_interval")), digits=3))
        out.append(row(f"{name.upper()} KL from SFT", kl, KL, "≤", "nats", digits=3))
    out.append(row("Wall clock", get("seconds", "total"), SECONDS, "≤", "s", digits=3))
    out.append(row("Peak memory", get("peak_rss_mib"), MEBIBYTES, "≤", "MiB", digits=4))
    return out


def _figures(evaluation: dict) -> list[Verdict]:
    known = {"perplexity": ("held-out perplexity", "per token")} | dict.fromkeys(("accuracy", "rewards/accuracies"), ("held-out accuracy", "of pairs"))
    out = []
    for name, e in evaluation.items():
        key = next((k for k in known if number(dig(e, k)) is not None), None)
        if key:
            what, unit = known[key]
            out.append(Verdict(f"{name}: {what}", show(number(e[key]), 3), "", " · ".join(x for x in (unit, interval(dig(e, "interval"))) if x), None))
    seconds, memory = number(dig(evaluation, "seconds", "total")), number(evaluation.get("peak_rss_mib"))
    out += [Verdict("Wall clock", f"{show(seconds, 3)} s", "", "", None)] if seconds is not None else []
    return out + ([Verdict("Peak memory", f"{show(memory, 4)} MiB", "", "", None)] if memory is not None else [])


def interval(x: Any) -> str:
    ends = [number(v) for v in x] if isinstance(x, (list, tuple)) else []
    return f"95% interval {show(ends[0], 3)} to {show(ends[1], 3)}" if len(ends) == 2 and None not in ends else ""


def headline(rows: list[Verdict]) -> tuple[str, bool | None]:
    """(a sentence, passed): True only if all is measured and met."""
    if rows and not any(r.target for r in rows):
        return "Held-out figures", None
    missed, unknown = sum(r.passed is False for r in rows), sum(r.passed is None for r in rows)
    if unknown == len(rows):
        return "Nothing has been evaluated yet", None
    parts = [f"{missed} of {len(rows)} targets missed"] if missed else []
    parts += [f"{unknown} of {len(rows)} not measured"] if unknown else []
    return (", ".join(parts), False if missed else None) if parts else (f"All {len(rows)} targets met", True)


def console(evaluation: Any) -> str:
    """The verdict table as plain text."""
    rows = verdicts(evaluation)
    if not rows:
        return headline(rows)[0]
    marks = {True: "pass", False: "FAIL", None: "  ? "}
    width = [max(len(r[i]) for r in rows) for i in range(3)]
    lines = [f"{marks[r.passed] if r.target else '    '}  {r.what:<{width[0]}}  {r.value:>{width[1]}}  {r.target:<{width[2]}}  {r.detail}".rstrip() for r in rows]
    return "\n".join([*lines, headline(rows)[0]])
