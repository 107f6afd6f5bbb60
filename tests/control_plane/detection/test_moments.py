"""Moments are orthonormal under the reference, are means, and show location and spread apart."""

import numpy as np
import pytest

from control_plane.detection.moments import angles, basis, class_counts, mean_log, moments

RNG = np.random.default_rng(3)
REFERENCE = RNG.multinomial(4000, np.full(16, 1 / 16), size=3)


def test_the_functions_are_orthonormal_under_the_reference() -> None:
    functions = basis(REFERENCE)
    p = (REFERENCE + 0.5) / (REFERENCE + 0.5).sum(axis=1, keepdims=True)
    gram = np.einsum("fb,fbk,fbl->fkl", p, functions, functions)
    assert np.allclose(gram, np.eye(2), atol=1e-9)
    assert np.allclose(np.einsum("fb,fbk->fk", p, functions), 0.0, atol=1e-9)


def test_moments_of_a_sum_are_the_weighted_moments_of_its_parts() -> None:
    functions = basis(REFERENCE)
    a, b = (RNG.multinomial(n, np.full(16, 1 / 16), size=3) for n in (30, 70))
    assert np.allclose(moments(a + b, functions), 0.3 * moments(a, functions) + 0.7 * moments(b, functions))


def test_a_shift_moves_the_location_and_a_widening_the_spread() -> None:
    functions = basis(np.full((1, 16), 1000))
    upper, ends = np.zeros((1, 16), int), np.zeros((1, 16), int)
    upper[0, 10:] = 10
    ends[0, [0, 1, 14, 15]] = 10
    location, spread = moments(upper, functions)
    assert location > 0.8
    wide_location, wide_spread = moments(ends, functions)
    assert abs(wide_location) < 1e-9
    assert wide_spread > 1.0 > spread


def test_unknown_features_are_no_evidence_and_a_flat_reference_no_failure() -> None:
    flat = np.zeros((2, 16), int)
    flat[:, 5] = 10**12
    functions = basis(flat)
    assert np.isfinite(functions).all()
    assert (moments(np.zeros((2, 16), int), functions) == 0.0).all()


def test_a_stack_of_counts_gives_a_row_each() -> None:
    functions = basis(REFERENCE)
    stack = RNG.multinomial(50, np.full(16, 1 / 16), size=(4, 3))
    assert np.allclose(moments(stack, functions), [moments(one, functions) for one in stack])


def test_classes_keep_their_order_and_others_count_nothing() -> None:
    assert class_counts({"rot": 2, "sound": 5, "stranger": 9}, ("sound", "rot", "worm")).tolist() == [5.0, 2.0, 0.0]
    assert angles(np.array([0.0, 1.0])) == pytest.approx([0.0, np.pi])


def test_the_mean_logarithm_of_a_weight_follows_its_scale() -> None:
    edges = tuple(np.exp(np.linspace(np.log(100.0), np.log(260.0), 15)))
    grams = np.exp(RNG.normal(np.log(170.0), 0.12, 20_000))
    counts = [np.bincount(np.searchsorted(edges, grams * scale), minlength=16).tolist() for scale in (1.0, 1.05)]
    assert mean_log(counts[1], edges) - mean_log(counts[0], edges) == pytest.approx(np.log(1.05), abs=0.003)
    assert np.isnan(mean_log([0] * 16, edges))
    assert np.isnan(mean_log(counts[0], (0.0, *edges[1:])))
