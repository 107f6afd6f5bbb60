"""What goes into the API; what comes out is described by the tables and these."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class Strict(BaseModel):
    """Unknown fields are refused: a misspelt option must not be ignored."""

    model_config = ConfigDict(extra="forbid")


class ErrorBody(BaseModel):
    """Every error looks like this."""

    code: str = Field(examples=["registry.unknown_version"])
    message: str
    expected: str | None = None
    got: str | None = None


Actor = Field(default="api", max_length=64, description="Who asks; kept in the audit trail.")


class NewDataset(Strict):
    """A folder of labelled photographs on the server's machine."""

    name: str = Field(max_length=64, pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    root: str = Field(description="Folder with labels.csv, or with one folder per class.")
    actor: str = Actor


class NewTrainingRun(Strict):
    """Train a model from a data set."""

    dataset: str = Field(description="Name of the data set.")
    name: str = Field(max_length=64, pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", description="Name of the model.")
    seed: int = 1
    effort: Literal["quick", "standard"] = "standard"
    folds: int = Field(default=5, ge=2, le=50)
    good_class: str = Field(default="", max_length=64, description="Empty = sound, good or ok.")
    abstain_budget: float = Field(default=0.0, ge=0.0, le=1.0, description="Most items the line may be unsure of.")
    actor: str = Actor


class NewImport(Strict):
    """Import a model that was trained elsewhere; `settings` are those of `sortline import-onnx`."""

    path: str
    settings: dict[str, Any]
    actor: str = Actor


class NewStage(Strict):
    """Move a model version to a stage."""

    stage: Literal["none", "staging", "production", "archived"]
    reason: str = Field(min_length=1, max_length=500)
    actor: str = Actor


def _everyone() -> list[int | str]:
    return ["100%"]


class NewRollout(Strict):
    """Bring a model version to agents, wave by wave."""

    model: str = Field(description="NAME, NAME:VERSION or a bundle digest.", examples=["apples:3"])
    selector: dict[str, str] = Field(default_factory=dict, description="Labels agents must have; empty = all.")
    waves: list[int | str] = Field(default_factory=_everyone, examples=[[1, "50%", "100%"]])
    trial_items: int = Field(default=50, ge=0, le=100_000)
    trial_s: float = Field(default=60.0, gt=0.0, le=86_400.0)
    abort_share: float = Field(default=0.2, gt=0.0, le=1.0)
    min_executed: int = Field(default=1, ge=1)
    actor: str = Actor


class Act(Strict):
    """Pause, resume, abort or roll back."""

    reason: str = Field(default="", max_length=500)
    actor: str = Actor


class NewLabels(Strict):
    """Labels of an agent."""

    labels: dict[str, str]
    actor: str = Actor


class NewToken(Strict):
    """Invite an agent."""

    actor: str = Actor


class Revoke(Strict):
    """End an identity."""

    reason: str = Field(min_length=1, max_length=200)
    actor: str = Actor
