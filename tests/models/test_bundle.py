"""Bundles: written and read back the same, and refused by name whatever is wrong with them."""

import json
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.bundle import (
    CARD,
    MANIFEST,
    MODEL,
    PARTS,
    RECIPE,
    describe,
    pack,
    parse_golden,
    parse_manifest,
    read_bundle,
    sha256,
    unpack,
    write_bundle,
)
from models.classifier import OnnxClassifier
from models.errors import BundleError
from models.golden import GOLDEN
from tests.simulators.tiny_bundle import tiny_bundle, tiny_files, tiny_graph

FILES = tiny_files()


def refused(code: str, directory: Path, **options: str) -> None:
    with pytest.raises(BundleError) as caught:
        read_bundle(directory, **options)
    assert caught.value.code == code


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    tiny_bundle(tmp_path / "b")
    return tmp_path / "b"


def test_read_gives_back_what_was_written_and_equal_content_has_an_equal_digest(tmp_path: Path) -> None:
    first, second = write_bundle(tmp_path / "1", "tiny", FILES), write_bundle(tmp_path / "2", "tiny", dict(FILES))
    again = read_bundle(tmp_path / "1")
    assert again.digest == first.digest == second.digest
    assert again.manifest == first.manifest
    assert again.model == FILES[MODEL]
    assert write_bundle(tmp_path / "3", "other", FILES).digest != first.digest


def test_unpack_gives_back_what_was_packed_and_packing_is_stable(bundle: Path, tmp_path: Path) -> None:
    data = pack(bundle)
    assert unpack(data, tmp_path / "u").digest == read_bundle(bundle).digest
    assert pack(tmp_path / "u") == data


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_a_flipped_byte_anywhere_is_found(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    directory = tmp_path_factory.mktemp("flip") / "b"
    tiny_bundle(directory)
    digest = read_bundle(directory).digest
    path = directory / data.draw(st.sampled_from([MANIFEST, *PARTS]))
    raw = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(raw) - 1))
    raw[at] ^= data.draw(st.integers(1, 255))
    path.write_bytes(bytes(raw))
    with pytest.raises(BundleError):
        read_bundle(directory, digest=digest)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_a_truncated_archive_is_refused_and_leaves_nothing(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    root = tmp_path_factory.mktemp("cut")
    tiny_bundle(root / "b")
    whole = pack(root / "b")
    cut = data.draw(st.integers(0, len(whole) - 20_000))
    with pytest.raises(BundleError):
        unpack(whole[:cut], root / "u")
    assert not (root / "u").exists()


def test_extra_missing_and_linked_files_are_refused(bundle: Path) -> None:
    (bundle / "extra.txt").write_text("x")
    refused("bundle.wrong_files", bundle)
    (bundle / "extra.txt").unlink()
    card = (bundle / CARD).read_bytes()
    (bundle / CARD).unlink()
    refused("bundle.wrong_files", bundle)
    (bundle / "../card.md").resolve().write_bytes(card)
    (bundle / CARD).symlink_to("../card.md")
    refused("bundle.wrong_files", bundle)


def test_a_wrong_digest_is_refused(bundle: Path) -> None:
    refused("bundle.wrong_digest", bundle, digest="0" * 64)
    (bundle / CARD).write_bytes(b"x" * len((bundle / CARD).read_bytes()))
    refused("bundle.wrong_digest", bundle)


@pytest.mark.parametrize("path", ["../x", "/etc/passwd", "a/../b", "a\\b", "./card.md", "a//b", "x\0"])
def test_a_path_that_leaves_the_bundle_is_refused(path: str) -> None:
    with pytest.raises(BundleError) as caught:
        parse_manifest(describe("tiny", {path: b"x"}).encoded())
    assert caught.value.code == "bundle.unsafe_path"


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"schema_version": 1}, "bundle.wrong_version"),
        ({"surprise": 1}, "bundle.malformed_manifest"),
        ({"kind": "other"}, "bundle.malformed_manifest"),
        ({"files": []}, "bundle.wrong_files"),
        ({"name": "../x"}, "bundle.malformed_manifest"),
    ],
)
def test_a_manifest_that_is_not_ours_is_refused(change: dict[str, object], code: str) -> None:
    value = json.loads(describe("tiny", FILES).encoded()) | change
    with pytest.raises(BundleError) as caught:
        parse_manifest(msgspec.json.encode(value))
    assert caught.value.code == code


def test_rubbish_and_oversize_manifests_are_refused() -> None:
    for data, code in ((b"{", "bundle.malformed_manifest"), (b" " * 200_000, "bundle.oversize")):
        with pytest.raises(BundleError) as caught:
            parse_manifest(data)
        assert caught.value.code == code


def test_a_manifest_with_wrong_sizes_is_refused(bundle: Path) -> None:
    value = json.loads((bundle / MANIFEST).read_bytes())
    value["files"][0]["size_bytes"] += 200_000
    (bundle / MANIFEST).write_bytes(msgspec.json.encode(value))
    refused("bundle.malformed_manifest", bundle)


def test_parts_that_do_not_fit_are_not_even_written(tmp_path: Path) -> None:
    recipe = json.loads(FILES[RECIPE]) | {"classes": ["sound", "a", "b"]}
    with pytest.raises(BundleError) as caught:
        write_bundle(tmp_path / "b", "tiny", FILES | {RECIPE: msgspec.json.encode(recipe)})
    assert caught.value.code == "bundle.inconsistent"
    assert list(tmp_path.iterdir()) == []


def test_golden_views_must_reproduce() -> None:
    golden = parse_golden(FILES[GOLDEN])
    assert golden.check(OnnxClassifier(FILES[MODEL])) <= golden.tolerance
    with pytest.raises(BundleError) as caught:
        golden.check(OnnxClassifier(tiny_graph(bias=0.5)))
    assert caught.value.code == "golden.mismatch"
    assert golden.encoded() == FILES[GOLDEN]


def test_golden_files_with_rubbish_or_pickles_are_refused() -> None:
    import io

    import numpy as np

    stream = io.BytesIO()
    np.savez(stream, views=np.array([{"a": 1}], dtype=object))
    for data in (b"", b"PK\3\4", FILES[GOLDEN][:100], stream.getvalue()):
        with pytest.raises(BundleError) as caught:
            parse_golden(data)
        assert caught.value.code == "golden.malformed"


@pytest.mark.parametrize(
    ("graph", "code"),
    [(b"not onnx", "model.unloadable"), (tiny_graph(poison="shape"), "model.wrong_signature")],
)
def test_a_graph_that_is_not_ours_is_refused(graph: bytes, code: str) -> None:
    with pytest.raises(BundleError) as caught:
        OnnxClassifier(graph)
    assert caught.value.code == code


def test_a_graph_that_answers_nan_or_gets_wrong_views_is_refused() -> None:
    import numpy as np

    with pytest.raises(BundleError) as caught:
        OnnxClassifier(tiny_graph(poison="nan")).classify(np.zeros((1, 64, 64, 3), np.uint8))
    assert caught.value.code == "model.not_finite"
    with pytest.raises(BundleError) as caught:
        OnnxClassifier(tiny_graph()).classify(np.zeros((1, 32, 32, 3), np.uint8))
    assert caught.value.code == "model.failed"


def test_the_format_has_not_changed_unnoticed() -> None:
    """A change of the format is a new version: this digest and BUNDLE.md change with it."""
    manifest = describe("tiny", {name: name.encode() for name in PARTS}).encoded()
    golden = Path(__file__).parents[1] / "golden" / "manifest-v2.json"
    assert manifest == golden.read_bytes()
    assert sha256(manifest) in (golden.with_suffix(".sha256")).read_text()
