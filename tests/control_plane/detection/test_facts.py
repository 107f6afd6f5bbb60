"""Facts of a bundle come from its profile, unless something better is known."""

import numpy as np

from control_plane.detection.facts import facts_of
from models.profile import build_profile

NAMES = ("entropy", "area_share")


def test_varieties_and_bins_of_scalars_come_from_the_profile() -> None:
    rng = np.random.default_rng(1)
    weights = rng.normal(170.0, 20.0, 200)
    profile = build_profile(
        rng.standard_normal((200, 2)).astype(np.float32),
        NAMES,
        {"sound": 180, "rot": 20},
        scalars={"weight_g": weights},
        varieties=["gala"] * 100 + ["fuji"] * 100,
        verdicts=["sound"] * 200,
    )
    facts = facts_of(profile)
    assert facts.features == NAMES
    assert facts.classes == ("sound", "rot")
    assert set(facts.varieties) == {"gala", "fuji"}
    assert facts.scalar_edges["weight_g"] == profile.scalars["weight_g"].edges
    assert facts.functions().shape == (2, 16, 2)
    assert facts_of(profile, varieties=(), scalar_edges={}).scalar_edges == {}
