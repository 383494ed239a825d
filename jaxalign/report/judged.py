"""What an evaluation says beyond the verdicts: calibration, best of n, how policies write and what that cost. Any part may be
missing, or be no number."""

from __future__ import annotations

from typing import Any

from jaxalign.report.charts import Series, lines
from jaxalign.report.markup import Html, tag
from jaxalign.report.read import dig, number, show

# key of a policy -> (heading, digits)
WRITING = {
    "proxy": ("learned reward", 3),
    "elo": ("Elo", 4),
    "distinct_1": ("distinct-1", 3),
    "distinct_2": ("distinct-2", 3),
    "self_bleu": ("self-BLEU", 3),
    "pretrain_nll": ("pretraining NLL", 4),
    "alignment_tax": ("alignment tax", 3),
}


def calibration(judged: Any) -> Html | None:
    """Accuracy of each bin of confidence beside the diagonal."""
    bins = dig(judged, "reliability")
    points = [xy for b in (bins if isinstance(bins, list) else []) if None not in (xy := (number(dig(b, "confidence")), number(dig(b, "accuracy"))))]
    if len(points) < 2:
        return None
    x, y = zip(*points)
    return lines([Series("accuracy", x, y), Series("calibrated", x, x, 5)], title="Calibration", x="confidence", unit="of held-out pairs or steps")


def best_of_n(evaluation: Any) -> Html | None:
    """Gold and learned reward of the best of n against its KL: where the two part, the learned one is being exploited."""
    rows = dig(evaluation, "best_of_n")
    points = [p for d in (rows if isinstance(rows, list) else []) if None not in (p := tuple(number(dig(d, k)) for k in ("kl", "gold", "proxy")))]
    if len(points) < 2:
        return None
    kl, gold, proxy = zip(*sorted(points))
    return lines([Series("gold", kl, gold, 2), Series("learned", kl, proxy, 1)], title="Best of n by the learned reward", x="KL from SFT, nats", unit="per answer")


def writing(known: dict[str, dict]) -> Html | None:
    """A table of `WRITING`, as far as any policy has it."""
    keys = [k for k in WRITING if any(number(d.get(k)) is not None for d in known.values())]
    if not keys:
        return None
    head = tag("tr", tag("th", ""), *(tag("th", WRITING[k][0], class_="n") for k in keys))
    rows = [tag("tr", tag("td", tag("b", p.upper())), *(tag("td", show(d.get(k), WRITING[k][1]), class_="n") for k in keys)) for p, d in known.items()]
    about = tag(
        "p",
        "Distinct-n: different n-grams among all, higher is more varied; self-BLEU: how much an answer is like the others, lower is. Alignment tax: "
        "nats per token of pretraining text that the policy lost against SFT. 400 points of Elo are odds of ten to one.",
        class_="soft",
    )  # fmt: skip
    return tag("div", tag("div", tag("table", tag("thead", head), tag("tbody", *rows)), class_="scroll"), about)
