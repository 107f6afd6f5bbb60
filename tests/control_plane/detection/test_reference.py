"""What is learnt from lots: the spread between them, the class mix taken out, thresholds from held-out lots."""

import numpy as np
import pytest

from control_plane.detection.reference import (
    BORROWED_MARGIN,
    MAX_LOTS,
    MIN_LOTS,
    LotRecord,
    LotReference,
    clipped,
    fit,
)

SIZE, KINDS = 6, 3


def lots(count: int, seed: int = 1, *, spread: float = 0.2, shift: float = 0.0, weight: float = 1.0) -> list[LotRecord]:
    rng = np.random.default_rng(seed)
    found = []
    for k in range(count):
        shares = rng.dirichlet((40.0, 4.0, 4.0))
        # A lot with more of the second class lies elsewhere in the first moment: that is no drift.
        z = spread * rng.standard_normal(SIZE) + np.eye(SIZE)[0] * 5.0 * shares[1] + shift
        size = 0.1 * rng.standard_normal()
        found.append(
            LotRecord(
                line=f"line-{k % 2}",
                lot=f"lot-{seed}-{k}",
                duration_s=2400.0,
                items=5000,
                z=z + (0.5 if k % 2 else 0.0),
                shares=shares,
                weight=5.0 + 0.8 * size + 0.005 * rng.standard_normal() + np.log(weight),
                size=size,
            )
        )
    return found


def test_a_reference_waits_for_its_lots_and_is_final_at_last() -> None:
    reference = LotReference()
    for record in lots(MIN_LOTS - 1):
        reference.add(record)
    assert reference.fit is None
    reference.add(lots(1, seed=2)[0])
    assert reference.fit is not None
    assert reference.fit.lots == MIN_LOTS
    for record in lots(MAX_LOTS, seed=3):
        reference.add(record)
    assert reference.fitted_lots == MAX_LOTS
    assert reference.records == [], "what came slowly later is not learnt"


def test_two_lines_on_the_same_lot_count_as_one_lot() -> None:
    reference = LotReference()
    for record in lots(MIN_LOTS):
        reference.add(record)
        reference.add(LotRecord(**{f: getattr(record, f) for f in record.__struct_fields__} | {"line": "line-9"}))
    assert reference.lots == MIN_LOTS


def test_the_class_mix_is_taken_out_and_the_lines_mean_too() -> None:
    found = fit(lots(200))
    more_defects = np.array([0.6, 0.35, 0.05])
    z = np.eye(SIZE)[0] * 5.0 * 0.35
    plain = z - found.line_means["line-0"]
    assert abs(plain[0]) > 1.0
    assert abs(found.residual("line-0", z, more_defects)[0]) < 0.25
    assert abs(found.line_means["line-1"] - found.line_means["line-0"] - 0.5).max() < 0.15


def test_whitened_lots_have_unit_variance_and_one_in_five_is_clipped() -> None:
    records = lots(400)
    found = fit(records)
    norms = [np.linalg.norm(found.covariate.whiten @ found.residual(r.line, r.z, r.shares)) for r in records]
    assert np.quantile(norms, 0.8) == pytest.approx(found.covariate.clip, rel=0.1)
    assert np.mean(np.square(norms)) == pytest.approx(SIZE, rel=0.15)


def test_thresholds_come_from_lots_that_were_not_fitted() -> None:
    """With many dimensions and few lots the fitted lots look calm; the held-out ones do not."""
    rng = np.random.default_rng(4)
    few = [
        LotRecord(
            line="l", lot=f"{k}", duration_s=2400.0, items=500, z=rng.standard_normal(24), shares=np.array([0.9, 0.1])
        )
        for k in range(40)
    ]
    found = fit(few)
    inside = max(np.linalg.norm(found.covariate.whiten @ found.residual(r.line, r.z, r.shares)) ** 2 for r in few)
    assert found.covariate.odd > inside


def test_a_clipped_vector_keeps_its_direction() -> None:
    long = np.array([3.0, 4.0])
    assert clipped(long, 1.0) == pytest.approx([0.6, 0.8])
    assert clipped(long, 9.0) is long


def test_a_new_variety_borrows_the_spread_about_its_own_mean() -> None:
    lender = fit(lots(120))
    reference = LotReference(records=lots(8, seed=7, shift=2.0))
    borrowed = reference.borrowed(lender)
    assert borrowed is not None
    assert borrowed.margin == BORROWED_MARGIN
    assert (borrowed.covariate.whiten == lender.covariate.whiten).all()
    assert (borrowed.mean - lender.mean > 1.5).all()
    assert LotReference(records=lots(3)).borrowed(lender) is None


def test_weight_is_compared_with_what_the_size_lets_expect() -> None:
    found = fit(lots(120))
    assert found.weight_slope == pytest.approx(0.8, abs=0.03)
    assert found.weight_residual("line-0", 5.0 + 0.8 * 0.3 + np.log(1.05), 0.3) == pytest.approx(0.05, abs=0.01)
    assert 0.0 < found.weight_largest < 0.02


def test_one_lot_is_no_reference() -> None:
    with pytest.raises(ValueError, match="5 lots"):
        fit(lots(4))
