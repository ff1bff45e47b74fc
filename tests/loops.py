"""The metrics' definitions once more, image by image in exact fractions."""

import math
from fractions import Fraction

import numpy as np


def loop_curve(scores, labels):
    """(true positives, seen) after each image that takes part, by falling score, ties in input order."""
    kept = [(s, int(y)) for s, y in zip(scores, labels, strict=True) if y >= 0]
    kept.sort(key=lambda pair: -pair[0])  # Python's sort is stable
    hits, curve = 0, []
    for seen, (score, y) in enumerate(kept, start=1):
        hits += y
        curve.append((score, y, hits, Fraction(hits, seen)))
    return curve, hits


def loop_ap(scores, labels, method):
    curve, total = loop_curve(scores, labels)
    if total == 0:
        return math.nan
    result = Fraction(0)
    if method == "voc_area":
        for k, (_, y, _, _) in enumerate(curve):
            if y:
                result += max(p for *_, p in curve[k:]) / total
    elif method == "voc11":
        for tenth in range(11):
            result += max(p for _, _, h, p in curve if Fraction(h, total) >= Fraction(tenth, 10)) / 11
    else:
        for score, y, _, _ in curve:
            if y:
                result += [p for s, _, _, p in curve if s == score][-1] / total
    return float(result)


def loop_aps(scores, labels, method):
    return np.array([loop_ap(scores[:, c], labels[:, c], method) for c in range(scores.shape[1])])


def loop_table(scores, labels, threshold, cf1="macro", top=None):
    """The six numbers; ``top`` keeps an image's highest scores, ties to the lower class."""
    n, num_classes = scores.shape
    threshold = np.broadcast_to(threshold, (num_classes,))
    hit, said, true = (np.zeros(num_classes) for _ in range(3))
    for b in range(n):
        valid = [c for c in range(num_classes) if labels[b, c] >= 0]
        kept = sorted(valid, key=lambda c: (-scores[b, c], c))[:top]
        for c in valid:
            predicted = c in kept and scores[b, c] > threshold[c]
            hit[c] += predicted and labels[b, c] == 1
            said[c] += predicted
            true[c] += labels[b, c] == 1

    def ratio(a, b):
        return a / b if b else 0.0

    def f1(p, r):
        return ratio(2 * p * r, p + r)

    ps = [ratio(a, b) for a, b in zip(hit, said, strict=True)]
    rs = [ratio(a, b) for a, b in zip(hit, true, strict=True)]
    cp, cr = np.mean(ps), np.mean(rs)
    cf = f1(cp, cr) if cf1 == "harmonic" else np.mean([f1(p, r) for p, r in zip(ps, rs, strict=True)])
    op, or_ = ratio(hit.sum(), said.sum()), ratio(hit.sum(), true.sum())
    return np.array([cp, cr, cf, op, or_, f1(op, or_)])
