"""Siblings on the same lot: the faulty one stands out, lots common to all do not, lasting differences are learnt."""

import numpy as np
import pytest

from control_plane.detection import contrast
from control_plane.detection.contrast import ContrastReference, Member, differences, new_member, new_reference, step

SIZE = 8
ITEMS = 50


@pytest.fixture(autouse=True)
def short_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contrast, "LEARN_S", (60_000.0, 30_000.0, 60_000.0))
    monkeypatch.setattr(contrast, "MEMBER_S", 3600.0)


class Group:
    """Four members with offsets of their own, on lots that differ by far more than the members."""

    def __init__(self, seed: int, members: int = 4) -> None:
        self.rng = np.random.default_rng(seed)
        self.offsets = 0.2 * self.rng.standard_normal((members, SIZE))
        self.members: list[Member] = [new_member(SIZE) for _ in range(members)]
        self.style, self.lot = np.zeros(SIZE), 0

    def step(self, reference: ContrastReference, fault: float = 0.0, culprit: int = 1) -> list[float]:
        if self.rng.random() < 1 / 40:
            self.lot += 1
            self.style = self.rng.standard_normal(SIZE)
        noise = self.rng.standard_normal((len(self.members), SIZE)) / np.sqrt(ITEMS)
        z = self.style + self.offsets + noise
        z[culprit, 0] += fault
        found = step(reference, self.members, z, span_s=60.0, lot=f"lot-{self.lot}")
        return [ratio for ratio, *_ in found]


@pytest.fixture(scope="module")
def learnt() -> tuple[Group, ContrastReference]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(contrast, "LEARN_S", (60_000.0, 30_000.0, 60_000.0))
        patch.setattr(contrast, "MEMBER_S", 3600.0)
        group, reference = Group(1), new_reference(SIZE)
        for _ in range(3000):
            group.step(reference)
            if reference.ready:
                return group, reference
    raise AssertionError("never ready")


def copy_of(learnt: tuple[Group, ContrastReference]) -> tuple[Group, ContrastReference]:
    import copy

    return copy.deepcopy(learnt)


def test_each_is_compared_with_the_median_of_the_others() -> None:
    rng = np.random.default_rng(2)
    for count in (3, 4, 5):
        z = rng.standard_normal((count, SIZE))
        expected = [row - np.median(np.delete(z, k, axis=0), axis=0) for k, row in enumerate(z)]
        assert np.allclose(differences(z), expected)


def test_nothing_is_said_while_learning() -> None:
    group, reference = Group(3), new_reference(SIZE)
    assert max(max(group.step(reference, fault=9.0)) for _ in range(50)) == 0.0


def test_benign_lots_stay_below_the_threshold(learnt: tuple[Group, ContrastReference]) -> None:
    group, reference = copy_of(learnt)
    assert max(max(group.step(reference)) for _ in range(1500)) < 1.0


@pytest.mark.parametrize(("fault", "most_steps"), [(0.6, 20), (0.3, 80)])
def test_the_faulty_member_stands_out_alone(
    learnt: tuple[Group, ContrastReference], fault: float, most_steps: int
) -> None:
    group, reference = copy_of(learnt)
    ratios: list[float] = []
    for _ in range(most_steps):
        ratios = group.step(reference, fault, culprit=2)
        if ratios[2] >= 1.0:
            break
    assert ratios[2] >= 1.0
    assert all(ratio < 1.0 for k, ratio in enumerate(ratios) if k != 2)


def test_what_all_see_is_no_fault_of_one(learnt: tuple[Group, ContrastReference]) -> None:
    group, reference = copy_of(learnt)
    group.offsets += 3.0
    assert max(max(group.step(reference)) for _ in range(200)) < 1.0


def test_a_new_member_is_judged_only_when_its_own_difference_is_known(
    learnt: tuple[Group, ContrastReference],
) -> None:
    group, reference = copy_of(learnt)
    group.members[0], group.offsets[0] = new_member(SIZE), group.offsets[0] + 1.0
    early = [group.step(reference)[0] for _ in range(50)]
    assert max(early) == 0.0
    later = [group.step(reference)[0] for _ in range(1000)]
    assert max(later) < 1.0
    assert group.members[0].known


def test_the_threshold_is_a_margin_over_the_reference(learnt: tuple[Group, ContrastReference]) -> None:
    """Without the margin or with a smaller reference maximum the benign run above would alarm."""
    group, reference = copy_of(learnt)
    reference.largest /= 2.0
    assert max(max(group.step(reference)) for _ in range(1500)) >= 1.0
