"""Routes of data sets."""

from typing import Annotated, Any

from fastapi import APIRouter, Depends

from control_plane.api.actor import Acting
from control_plane.api.schemas import NewDataset
from control_plane.data.catalog import add_dataset, datasets_with_versions
from control_plane.database.engine import reading, writing
from control_plane.database.tables.columns import utc_now
from control_plane.services import Services, services_of

router = APIRouter(prefix="/api/v1", tags=["datasets"])
Given = Annotated[Services, Depends(services_of)]


@router.post("/datasets", status_code=201)
def create_dataset(body: NewDataset, services: Given, actor: Acting) -> dict[str, Any]:
    """Registers a folder. A training run reads it; a version is noted each time its content has changed."""
    with writing(services.engine) as session:
        dataset = add_dataset(session, body.name, body.root, actor=actor, now=utc_now())
        session.commit()
        return dataset.model_dump(mode="json")


@router.get("/datasets")
def list_datasets(services: Given) -> list[dict[str, Any]]:
    """All data sets with their versions."""
    with reading(services.engine) as session:
        return [
            dataset.model_dump(mode="json") | {"versions": [version.model_dump(mode="json") for version in versions]}
            for dataset, versions in datasets_with_versions(session)
        ]
