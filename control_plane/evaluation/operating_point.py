"""Costs of a recipe's terms on held-out items: the curve over the threshold, its minimum, and the abstain band.

Everything is computed from the fused probabilities of items the model never saw, which travel in the bundle's
lineage: the curve needs no data. Items are weighted so that defects have the share the terms expect. A cost is what
mistakes cost above perfect grading, per 1000 items. Intervals are bootstraps over items, 95 %: twenty items make
them wide, and they are shown.
"""

from dataclasses import dataclass, replace
from typing import Annotated, Any, Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from models.errors import InputError
from models.recipe import Policy, Recipe, Terms
from models.statistics import wilson_interval

PER: Final = 1000.0
MAX_ITEMS: Final = 5000
_DRAWS: Final = 400
_LOGITS: Final = np.linspace(-7.0, 7.0, 57)
_GRID: Final = np.unique(np.concatenate([np.linspace(0.0, 1.0, 101), 1.0 / (1.0 + np.exp(-_LOGITS))]).round(6))
Floats = NDArray[np.float64]


class HeldOut(msgspec.Struct, frozen=True, kw_only=True):
    """Items that neither model nor fusion has learnt from (`held_out` of the lineage)."""

    classes: tuple[str, ...]
    truth: tuple[Annotated[int, msgspec.Meta(ge=0)], ...]
    """The class of each item, as a column of the recipe."""
    probabilities: tuple[tuple[float, ...], ...]
    """The fused probabilities of each item."""

    def arrays(self) -> tuple[NDArray[np.intp], Floats]:
        """Returns truth (N,) and probabilities (N, C).

        Raises:
            InputError: `recipe.bad_held_out`.
        """
        count = len(self.classes)
        whole = len(self.truth) == len(self.probabilities) and all(len(row) == count for row in self.probabilities)
        truth = np.array(self.truth, np.intp)
        fused = np.array(self.probabilities if whole else (), np.float64).reshape(-1, count)
        sums_ok = whole and bool(np.isclose(fused.sum(axis=1), 1.0, atol=1e-3).all())
        if not len(truth) or not sums_ok or fused.min() < 0.0 or truth.max() >= count:
            raise InputError(
                "recipe.bad_held_out",
                "The held-out items of this bundle contradict themselves.",
                expected=f"items with {count} probabilities that sum to 1",
                got=fused.shape,
            )
        return truth, fused


def hold_out(classes: tuple[str, ...], truth: NDArray[np.integer], fused: Floats, *, seed: int = 0) -> HeldOut:
    """Returns held-out items for a lineage: all of them, or a seeded sample of `MAX_ITEMS`."""
    rows = np.arange(len(truth))
    if len(rows) > MAX_ITEMS:
        rows = np.sort(np.random.default_rng(seed).choice(rows, MAX_ITEMS, replace=False))
    rounded = [tuple(round(float(p), 5) for p in row) for row in fused[rows]]
    return HeldOut(classes=classes, truth=tuple(int(t) for t in truth[rows]), probabilities=tuple(rounded))


def held_out_of(lineage: dict[str, object], recipe: Recipe) -> HeldOut:
    """Returns the held-out items of a bundle.

    Raises:
        InputError: `recipe.no_held_out`, after which a labelled folder can be used; `recipe.bad_held_out`.
    """
    try:
        found = msgspec.convert(lineage["held_out"], HeldOut)
    except (KeyError, msgspec.ValidationError) as error:
        raise InputError(
            "recipe.no_held_out",
            "This bundle brings no held-out items; give a labelled folder.",
            expected="held_out in lineage.json",
            got=str(error)[:120],
        ) from error
    if found.classes != recipe.classes:
        raise InputError(
            "recipe.bad_held_out",
            "The held-out items of this bundle contradict themselves.",
            expected=list(recipe.classes),
            got=list(found.classes),
        )
    found.arrays()
    return found


@dataclass(frozen=True, slots=True)
class _Items:
    """Held-out items under one policy, and bootstrap draws of them."""

    policy: Policy
    fused: Floats
    truth: NDArray[np.intp]
    good: int
    weights: Floats
    """The weight of each item, mean 1, that gives defects the expected share."""
    draws: Floats
    """(D, N), how often each bootstrap draw took the item, times its weight."""

    @property
    def bad(self) -> NDArray[np.bool_]:
        return np.asarray(self.truth != self.good, np.bool_)

    @property
    def defect(self) -> Floats:
        return np.asarray(1.0 - self.fused[:, self.good], np.float64)

    def effective(self, of: NDArray[np.bool_]) -> float:
        own = self.weights[of]
        return float(own.sum() ** 2 / (own**2).sum()) if len(own) else 0.0


def _items(held: HeldOut, recipe: Recipe, variety: str, lot: str, seed: int) -> _Items:
    truth, fused = held.arrays()
    terms = recipe.terms_of(variety, lot)
    bad = truth != recipe.good
    if bad.all() or not bad.any():
        raise InputError(
            "recipe.one_kind", "Costs need good and defective items.", expected="both", got=f"{int(bad.sum())} bad"
        )
    share = recipe.fusion.prior if terms.defect_share is None else terms.defect_share
    weights = np.where(bad, share / bad.mean(), (1.0 - share) / (1.0 - bad.mean()))
    rng = np.random.default_rng(seed)
    draws = rng.multinomial(len(truth), np.full(len(truth), 1.0 / len(truth)), _DRAWS) * weights
    return _Items(recipe.policy(variety, lot), fused, truth, recipe.good, weights, draws)


def tuned(recipe: Recipe, held: HeldOut) -> Recipe:
    """Returns the recipe with the abstain band of every layer learnt for its budget."""
    terms = recipe.terms
    recipe = msgspec.structs.replace(recipe, terms=_with_band(recipe, held, terms, "", ""))
    varieties = {name: _with_band(recipe, held, own, name, "") for name, own in recipe.varieties.items()}
    recipe = msgspec.structs.replace(recipe, varieties=varieties)
    lots = {name: _with_band(recipe, held, own, "", name) for name, own in recipe.lots.items()}
    return msgspec.structs.replace(recipe, lots=lots)


def _with_band(recipe: Recipe, held: HeldOut, own: Terms, variety: str, lot: str) -> Terms:
    """Returns `own` with the limit that keeps the layer within its budget, or without limit if it has no budget."""
    terms = recipe.terms_of(variety, lot)
    budget = terms.abstain_budget or 0.0
    if budget == 0.0:
        return msgspec.structs.replace(own, abstain_above=None)
    items = _items(held, recipe, variety, lot, 0)
    _, regrets = items.policy.choose(items.fused)
    return msgspec.structs.replace(own, abstain_above=_limit(regrets, items.weights, budget))


def _limit(regrets: Floats, weights: Floats, budget: float) -> float:
    """Returns the smallest regret above which there is no more than a share `budget` of the weight."""
    if budget >= 1.0:
        return 0.0
    order = np.argsort(-regrets, kind="stable")
    above = np.cumsum(weights[order]) / weights.sum()
    row = int(np.searchsorted(above, budget + 1e-12, side="right"))
    return float(regrets[order[min(row, len(order) - 1)]])


def cost_report(held: HeldOut, recipe: Recipe, *, variety: str = "", lot: str = "", seed: int = 0) -> dict[str, Any]:
    """Returns costs over the threshold, the place of the recipe's own threshold, and the minimum.

    Args:
        held: Held-out items.
        recipe: Recipe whose terms are used.
        variety: Variety whose terms are used; empty = those of the recipe.
        lot: Lot whose terms are used; empty = those of the variety.
        seed: Seed of the bootstrap.

    Returns:
        `curve` (rows of threshold, cost with interval, escape and false-reject rate), `recipe` (what its decisions
        cost and let through), `minimum` (where the curve is lowest; `saves`: against the recipe's threshold),
        `abstain`, counts and a `note`. Costs are per 1000 items above perfect grading; thresholds are on the scale
        of `Verdict.defect`. The curve never abstains.

    Raises:
        InputError: `recipe.one_kind`, `recipe.bad_held_out`.
    """
    items = _items(held, recipe, variety, lot, seed)
    cut = recipe.threshold(variety, lot)
    grid = _GRID if cut is None else np.unique(np.append(_GRID, cut))
    losses, rejected = _at_thresholds(items, grid)
    cost, low, high = _mean(items, losses)
    best = _cheapest(cost)
    totals = items.draws @ losses
    lowest = grid[[_cheapest(total) for total in totals]]
    here = int(np.searchsorted(grid, cut)) if cut is not None else len(grid) - 1
    saved = PER * (totals[:, here] - totals[:, best]) / items.draws.sum(axis=1)
    bad, count = items.bad, len(items.truth)
    escape = np.average(~rejected[bad], axis=0, weights=items.weights[bad])
    false_reject = np.average(rejected[~bad], axis=0, weights=items.weights[~bad])
    return {
        "items": count,
        "bad_items": int(bad.sum()),
        "defect_share": round(float(np.average(bad, weights=items.weights)), 4),
        "curve": [
            {
                "threshold": round(float(t), 6),
                "cost": round(float(cost[k]), 3),
                "low": round(float(low[k]), 3),
                "high": round(float(high[k]), 3),
                "escape_rate": round(float(escape[k]), 4),
                "false_reject_rate": round(float(false_reject[k]), 4),
            }
            for k, t in enumerate(grid)
        ],
        "recipe": _as_decided(items) | {"threshold": None if cut is None else round(cut, 6)},
        "minimum": {
            "threshold": round(float(grid[best]), 6),
            "low": round(float(np.quantile(lowest, 0.025)), 6),
            "high": round(float(np.quantile(lowest, 0.975)), 6),
            "cost": round(float(cost[best]), 3),
            "saves": {
                "value": round(float(cost[here] - cost[best]), 3),
                "low": round(float(np.quantile(saved, 0.025)), 3),
                "high": round(float(np.quantile(saved, 0.975)), 3),
            },
        },
        "note": f"{count} held-out items, {int(bad.sum())} of them defective: read the intervals."
        if count < 200
        else "",
    }


def _cheapest(costs: Floats) -> int:
    """Returns the middle of the thresholds with the least cost: between two items all thresholds cost the same.

    The estimate and its resamples must take the same one, or the estimate lies outside its own interval.
    """
    plateau = np.flatnonzero(costs <= costs.min() + 1e-9)
    return int(plateau[len(plateau) // 2])


def _at_thresholds(items: _Items, grid: Floats) -> tuple[Floats, NDArray[np.bool_]]:
    """Returns (N, T) loss of each item, and whether it leaves the good grade, at each threshold."""
    policy = items.policy
    others = replace(policy, grades=policy.grades[1:], losses=policy.losses[1:], holds=policy.holds[1:])
    chosen = 1 + others.choose(items.fused)[0] if others.grades else np.zeros(len(items.truth), np.intp)
    least = policy.losses.min(axis=0)[items.truth]
    kept = policy.losses[0, items.truth] - least
    out = policy.losses[chosen, items.truth] - least
    rejected = items.defect[:, None] >= grid[None, :]
    return np.where(rejected, out[:, None], kept[:, None]), rejected


def _mean(items: _Items, losses: Floats) -> tuple[Floats, Floats, Floats]:
    """Returns (T,) cost per 1000 items and its interval."""
    cost = PER * np.average(losses, axis=0, weights=items.weights)
    draws = PER * (items.draws @ losses) / items.draws.sum(axis=1, keepdims=True)
    low, high = np.quantile(draws, (0.025, 0.975), axis=0)
    return np.asarray(cost, np.float64), np.asarray(low, np.float64), np.asarray(high, np.float64)


def _as_decided(items: _Items) -> dict[str, Any]:
    """Returns costs and error rates of the recipe's own decisions, abstentions included."""
    policy = items.policy
    chosen, regrets = policy.choose(items.fused)
    unsure = regrets > policy.abstain_above
    losses = policy.losses[chosen, items.truth] - policy.losses.min(axis=0)[items.truth]
    cost, low, high = _mean(items, np.where(unsure, policy.recirculated, losses)[:, None])
    shares = {
        "escape_rate": ((chosen == 0) & ~unsure, items.bad),
        "false_reject_rate": ((chosen != 0) & ~unsure, ~items.bad),
        "abstain": (unsure, np.ones(len(unsure), np.bool_)),
    }
    found: dict[str, Any] = {
        "cost": {"value": round(float(cost[0]), 3), "low": round(float(low[0]), 3), "high": round(float(high[0]), 3)}
    }
    for name, (hit, among) in shares.items():
        share = float(np.average(hit[among], weights=items.weights[among]))
        bounds = wilson_interval(share, items.effective(among))
        found[name] = {"value": round(share, 4), "low": round(bounds[0], 4), "high": round(bounds[1], 4)}
    found["abstain"]["budget"] = policy.budget
    return found
