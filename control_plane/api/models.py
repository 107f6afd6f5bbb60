"""Routes of models and their versions."""

import tempfile
from pathlib import Path
from typing import Annotated, Any, Final

import anyio
import anyio.to_thread
from fastapi import APIRouter, Depends, Request, Response

from control_plane.api.actor import Acting
from control_plane.api.schemas import NewStage
from control_plane.database.engine import reading, writing
from control_plane.database.tables.columns import utc_now
from control_plane.database.tables.registry import Stage
from control_plane.registry.versions import find_version, models_with_versions, register, set_stage
from control_plane.services import Services, services_of
from models.bundle import CARD, pack, unpack

router = APIRouter(prefix="/api/v1", tags=["models"])
Given = Annotated[Services, Depends(services_of)]


@router.get("/models")
def list_models(services: Given) -> list[dict[str, Any]]:
    """All models with their versions, newest first; `release` says whether a version is `released` or `withdrawn`."""
    with reading(services.engine) as session:
        known = services.signer.releases(session)
        return [
            model.model_dump(mode="json")
            | {
                "versions": [
                    version.model_dump(mode="json", exclude={"lineage"}) | {"release": known.get(version.bundle, "")}
                    for version in versions
                ]
            }
            for model, versions in models_with_versions(session)
        ]


@router.get("/versions/{reference}")
def show_version(reference: str, services: Given) -> dict[str, Any]:
    """One version (`NAME`, `NAME:NUMBER` or a bundle digest) with lineage and card."""
    with reading(services.engine) as session:
        model, version = find_version(session, reference)
        card = services.store.part(version.bundle, CARD).decode(errors="replace")
        return version.model_dump(mode="json") | {"model": model.name, "card": card}


@router.post("/versions/{reference}/stage")
def stage_version(reference: str, body: NewStage, services: Given, actor: Acting) -> dict[str, Any]:
    """Moves a version to a stage, with a reason for the audit trail."""
    with writing(services.engine) as session:
        version = set_stage(session, reference, Stage(body.stage), actor=actor, reason=body.reason, now=utc_now())
        session.commit()
        return version.model_dump(mode="json", exclude={"lineage"})


@router.get("/versions/{reference}/bundle", response_class=Response)
def download_bundle(reference: str, services: Given) -> Response:
    """The bundle as a tar."""
    with reading(services.engine) as session:
        model, version = find_version(session, reference)
    with tempfile.TemporaryDirectory(dir=services.config.root) as scratch:
        data = pack(services.store.write_directory(version.bundle, Path(scratch) / "bundle"))
    name = f"{model.name}-{version.number}.tar"
    headers = {"content-disposition": f'attachment; filename="{name}"', "x-sortline-digest": version.bundle}
    return Response(data, media_type="application/x-tar", headers=headers)


@router.post("/versions", status_code=201)
async def upload_bundle(request: Request, services: Given, actor: Acting) -> dict[str, Any]:
    """Takes a bundle (the body is its tar) into the registry, after verifying all of it."""
    scratch = tempfile.TemporaryDirectory(dir=services.config.root, prefix="upload-")
    try:
        # What arrives goes to the disk and not into memory, and no byte of it is handled on the event loop.
        archive = Path(scratch.name) / "bundle.tar"
        async with await anyio.open_file(archive, "wb") as file:
            async for part in request.stream():
                await file.write(part)
        return await anyio.to_thread.run_sync(_register, services, archive, actor, limiter=_unpacking)
    finally:
        await anyio.to_thread.run_sync(scratch.cleanup)


_unpacking: Final = anyio.CapacityLimiter(1)
"""A bundle is unpacked in memory: one upload at a time, the others wait."""


def _register(services: Services, archive: Path, actor: str) -> dict[str, Any]:
    directory = archive.with_name("bundle")
    unpack(archive.read_bytes(), directory)
    with writing(services.engine) as session:
        version = register(session, services.store, directory, actor=actor, now=utc_now())
        session.commit()
        return version.model_dump(mode="json", exclude={"lineage"})
