"""Pixels become views in one way, whatever they come from; hostile images are refused by name."""

from pathlib import Path

import cv2
import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.errors import BundleError, InputError
from models.preprocess import (
    decode_photo,
    make_view,
    mask_of_photo,
    sample_bits,
    segment_photo,
    view_features,
    view_of_photo,
)
from models.view_spec import VIEW_FEATURES, PreprocessSpec

SPEC = PreprocessSpec()


def disc(height: int, width: int, centre: tuple[int, int], radius: int) -> np.ndarray:
    mask = np.zeros((height, width), np.uint8)
    cv2.circle(mask, centre, radius, 255, -1)
    return mask


def apple(backdrop: int = 255, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    mask = disc(100, 120, (60, 50), 40)
    image = np.full((100, 120, 3), backdrop, np.uint8)
    texture = np.random.default_rng(seed).integers(60, 160, image.shape, dtype=np.uint8)
    image[mask > 0] = texture[mask > 0]
    return image, mask


def test_the_backdrop_cannot_reach_the_view() -> None:
    views = [make_view(*apple(backdrop), SPEC) for backdrop in (0, 90, 255)]
    assert np.array_equal(views[0], views[1])
    assert np.array_equal(views[0], views[2])
    assert views[0].shape == (64, 64, 3)
    assert views[0][0, 0].max() == 0
    assert views[0][32, 32].min() > 0


@given(st.integers(-30, 30), st.integers(-30, 30))
def test_the_place_in_the_image_does_not_matter(dx: int, dy: int) -> None:
    image, mask = apple()
    moved = np.full((200, 220, 3), 7, np.uint8)
    moved_mask = np.zeros((200, 220), np.uint8)
    moved[50 + dy : 150 + dy, 50 + dx : 170 + dx] = image
    moved_mask[50 + dy : 150 + dy, 50 + dx : 170 + dx] = mask
    assert np.array_equal(make_view(image, mask, SPEC), make_view(moved, moved_mask, SPEC))


def test_an_item_at_the_image_edge_and_an_item_of_one_pixel_give_a_view() -> None:
    image, _ = apple()
    corner = np.zeros((100, 120), np.uint8)
    corner[90:, 100:] = 255
    assert make_view(image, corner, SPEC).any()
    point = np.zeros((100, 120), np.uint8)
    point[50, 60] = 1
    assert make_view(image, point, SPEC).any()


def test_black_item_pixels_are_still_item() -> None:
    _, mask = apple()
    view = make_view(np.zeros((100, 120, 3), np.uint8), mask, SPEC)
    assert view[32, 32].tolist() == [1, 1, 1]


def test_an_empty_mask_and_a_wrong_shape_are_refused() -> None:
    image, mask = apple()
    with pytest.raises(InputError) as caught:
        make_view(image, np.zeros_like(mask), SPEC)
    assert caught.value.code == "view.empty_mask"
    for wrong in (mask[:50], mask[:, :, None]):
        with pytest.raises(InputError) as caught:
            make_view(image, wrong, SPEC)
        assert caught.value.code == "view.wrong_shape"


def test_a_photograph_is_cut_out_of_its_plain_backdrop() -> None:
    image, mask = apple()
    found = segment_photo(image)
    assert (found != mask).mean() < 0.005
    image[45:50, 55:60] = 255  # a highlight as white as the backdrop is not a hole
    assert segment_photo(image)[47, 57] == 255


def test_a_photograph_without_backdrop_is_all_item() -> None:
    assert segment_photo(np.full((50, 50, 3), 80, np.uint8)).min() == 255


def test_a_png_with_alpha_gives_the_very_view_of_its_mask(tmp_path: Path) -> None:
    image, mask = apple()
    cv2.imwrite(str(tmp_path / "view.png"), np.dstack([image, mask]))
    assert np.array_equal(view_of_photo(tmp_path / "view.png", SPEC), make_view(image, mask, SPEC))


def test_unreadable_truncated_and_missing_photographs_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        view_of_photo(tmp_path / "none.jpg", SPEC)
    assert caught.value.code == "photo.missing"
    for data in (b"", b"not an image", cv2.imencode(".png", apple()[0])[1].tobytes()[:30]):
        with pytest.raises(InputError) as caught:
            decode_photo(data, name="x.png")
        assert caught.value.code == "photo.unreadable"


def test_grey_photographs_become_three_channels() -> None:
    image, alpha = decode_photo(cv2.imencode(".png", np.full((8, 9), 33, np.uint8))[1].tobytes(), name="grey")
    assert image.shape == (8, 9, 3)
    assert alpha is None


def test_monitored_features_say_what_their_names_promise() -> None:
    image, mask = apple()
    plain = dict(zip(VIEW_FEATURES, view_features(make_view(image, mask, SPEC)), strict=True))
    dim = (image * 0.5).astype(np.uint8)
    darker = dict(zip(VIEW_FEATURES, view_features(make_view(dim, mask, SPEC)), strict=True))
    blurred = cv2.GaussianBlur(image, (0, 0), 2.0)
    soft = dict(zip(VIEW_FEATURES, view_features(make_view(blurred, mask, SPEC)), strict=True))
    assert darker["lightness"] == pytest.approx(plain["lightness"] / 2, rel=0.03)
    assert soft["sharpness"] < plain["sharpness"] - 1.0
    assert plain["aspect"] == pytest.approx(1.0, abs=0.05)
    assert plain["centre_x"] == pytest.approx(0.5, abs=0.03)
    assert plain["area_share"] == pytest.approx(np.pi / 4 / 1.08**2, abs=0.03)
    assert np.isnan(view_features(np.zeros((64, 64, 3), np.uint8))).all()


def test_scalars_are_named_in_order_and_absent_where_there_are_none() -> None:
    assert b"scalars" not in SPEC.encoded()
    assert msgspec.json.decode(SPEC.encoded(), type=PreprocessSpec) == SPEC
    weighed = PreprocessSpec(scalars=("weight_g", "length_mm"))
    assert msgspec.json.decode(weighed.encoded(), type=PreprocessSpec) == weighed
    row = weighed.scalar_row({"length_mm": 71.5, "weight_g": None, "sugar_brix": 12.0})
    assert np.isnan(row[0])
    assert row[1] == np.float32(71.5)
    assert SPEC.scalar_row({"weight_g": 9.0}).shape == (0,)


@pytest.mark.parametrize("names", ['["Weight"]', '["weight g"]', '[""]', "[1]"])
def test_names_of_scalars_that_no_line_can_give_are_refused(names: str) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.json.decode(f'{{"scalars":{names}}}', type=PreprocessSpec)


def test_a_scalar_named_twice_is_refused() -> None:
    with pytest.raises(BundleError) as caught:
        PreprocessSpec(scalars=("weight_g", "weight_g")).check()
    assert caught.value.code == "preprocess.inconsistent"


def encoded(image: np.ndarray, ending: str = ".png") -> bytes:
    return cv2.imencode(ending, image)[1].tobytes()


@pytest.mark.parametrize("bits", [10, 12, 14, 16])
@pytest.mark.parametrize("ending", [".png", ".tiff"])
def test_sixteen_bit_photographs_are_scaled_by_the_bits_they_use(tmp_path: Path, bits: int, ending: str) -> None:
    image, _ = apple()
    deep = (image.astype(np.uint32) * (2**bits - 1) // 255).astype(np.uint16)
    decoded, alpha = decode_photo(encoded(deep, ending), name="deep")
    assert alpha is None
    assert np.abs(decoded.astype(int) - image).max() <= 1
    (tmp_path / f"a{ending}").write_bytes(encoded(deep, ending))
    (tmp_path / f"b{ending}").write_bytes(encoded(image, ending))
    assert sample_bits(tmp_path / f"a{ending}") == bits
    assert sample_bits(tmp_path / f"b{ending}") is None
    assert sample_bits(tmp_path / "none") is None


def test_a_dark_photograph_keeps_its_darkness_where_the_depth_is_known() -> None:
    image, _ = apple(backdrop=0)
    deep = (image // 4).astype(np.uint16) * 257
    decoded, _ = decode_photo(encoded(deep), name="dark", depth_bits=16)
    assert np.abs(decoded.astype(int) - image // 4).max() <= 1


@pytest.mark.parametrize("deep", [False, True])
def test_an_alpha_channel_that_hides_nothing_is_no_mask(deep: bool) -> None:
    image, mask = apple()
    expected = make_view(image, segment_photo(image), SPEC)
    for alpha, hides in ((np.full_like(mask, 255), False), (np.full_like(mask, 254), False), (mask, True)):
        whole = np.dstack([image, alpha])
        data = encoded(whole.astype(np.uint16) * 257 if deep else whole)
        decoded, found = decode_photo(data, name="rgba")
        assert found is not None
        chosen = mask_of_photo(decoded, found, SPEC)
        view = make_view(decoded, chosen, SPEC)
        assert np.array_equal(view, make_view(image, mask, SPEC) if hides else expected)


def test_pixels_that_are_no_numbers_of_a_camera_are_refused() -> None:
    with pytest.raises(InputError) as caught:
        decode_photo(encoded(np.ones((8, 8, 3), np.float32), ".tiff"), name="float")
    assert caught.value.code == "photo.wrong_type"
