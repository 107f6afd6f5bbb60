"""What goes into the API; what comes out is described by the tables and these."""

from math import isfinite
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from models.messages import Mode, SafeState, Swap


class Strict(BaseModel):
    """Unknown fields are refused: a misspelt option must not be ignored. So is what no table can hold."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def storable(cls, values: Any) -> Any:
        """Refuses NUL characters, lone surrogates, endless numbers and integers beyond 2**53, at any depth."""
        _check_storable(values, depth=0)
        return values


_MAX_INTEGER: Final = 2**53
"""Integers up to here are the same in JSON of every client, and fit every column."""
_MAX_DEPTH: Final = 32


def _check_storable(value: Any, depth: int) -> None:
    if depth > _MAX_DEPTH:
        raise ValueError(f"nested deeper than {_MAX_DEPTH} levels")
    if isinstance(value, str):
        if "\x00" in value or any("\ud800" <= character <= "\udfff" for character in value):
            raise ValueError("text holds a NUL character or half a character")
    elif isinstance(value, float):
        if not isfinite(value):
            raise ValueError("a number is not finite")
    elif isinstance(value, int):
        if abs(value) > _MAX_INTEGER:
            raise ValueError("an integer is larger than 2**53")
    elif isinstance(value, dict):
        for key, entry in value.items():
            _check_storable(key, depth + 1)
            _check_storable(entry, depth + 1)
    elif isinstance(value, list):
        for entry in value:
            _check_storable(entry, depth + 1)


class ErrorBody(BaseModel):
    """Every error looks like this."""

    code: str = Field(examples=["registry.unknown_version"])
    message: str
    expected: str | None = None
    got: str | None = None


Actor = Field(default="", max_length=200, description="Who acts; kept in the audit trail. Empty = `api`.")


class NewDataset(Strict):
    """A folder of labelled photographs on the server's machine."""

    name: str = Field(max_length=64, pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    root: str = Field(description="Folder with labels.csv, or with one folder per class.")
    actor: str = Actor


class NewTrainingRun(Strict):
    """A training run on a data set. The bounds of the options are checked in `jobs.requests`, for every door alike."""

    dataset: str = Field(max_length=64, description="Name of the data set.")
    name: str = Field(max_length=200, description="Name of the model: letters, digits, `.`, `_`, `-`; at most 64.")
    seed: int = Field(default=1, description="0 to 4294967295.")
    effort: str = Field(default="standard", max_length=32, description="`quick` or `standard`.")
    folds: int = Field(default=5, description="Parts of the cross-validation, 2 to 50.")
    good_class: str = Field(default="", max_length=64, description="Empty = sound, good or ok.")
    abstain_budget: float = Field(default=0.0, description="Largest share of items the line may be unsure of, 0 to 1.")
    scalars: list[str] | None = Field(
        default=None,
        max_length=16,
        description="Measured columns of labels.csv to learn from; null = weight_g and length_mm where they exist.",
    )
    precision: str = Field(default="float32", max_length=32, description="`float32` or `int8`.")
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


_NAME = r"^[^\x00-\x1f\x7f-\x9f\u2028\u2029]*$"
"""One line of text."""


def _everyone() -> list[int | str | list[str]]:
    return ["100%"]


_RATE = {
    "maximumPerMinute": 1000,
    "exponentialRate": {
        "baseRatePerMinute": 50,
        "incrementFactor": 2,
        "rateIncreaseCriteria": {"numberOfNotifiedThings": 1000},
    },
}
_ABORT = {
    "criteriaList": [
        {"failureType": "FAILED", "action": "CANCEL", "thresholdPercentage": 20, "minNumberOfExecutedThings": 100}
    ]
}
_SCHEDULE = {
    "startTime": "2026-05-01 04:30",
    "endTime": "2026-05-08 04:30",
    "endBehavior": "STOP_ROLLOUT",
    "maintenanceWindows": [{"startTime": "cron(30 22 ? * MON-FRI *)", "durationInMinutes": 120}],
}
_WAVE = {
    "successThresholdPercentage": 90,
    "successAction": "NEXTGROUP",
    "errorThreshold": {"count": 2},
    "errorAction": "PAUSE",
}


class NewRollout(Strict):
    """Bring a model version to agents, wave by wave. The camelCase parameters are those of AWS IoT Jobs, verbatim."""

    model: str = Field(description="NAME, NAME:VERSION or a bundle digest.", examples=["apples:3"])
    selector: str = Field(
        default="",
        max_length=1000,
        description="Labels; empty = all.",
        examples=["site=wenatchee,line in (1,2),!canary"],
    )
    agents: list[str] = Field(
        default_factory=list, max_length=5000, description="Exactly these, instead of a selector."
    )
    waves: list[int | str | list[str]] = Field(
        default_factory=_everyone,
        min_length=1,
        max_length=100,
        description="Cumulative sizes (numbers or percent), or lists of agents.",
        examples=[[["line-7"], 3, "50%", "100%"]],
    )
    exclude: list[str] = Field(
        default_factory=list, max_length=5000, description="These take no part, although they are selected."
    )
    mode: Mode = Field(default=Mode.LIVE, description="What the bundle does on the line.")
    min_items: int = Field(
        default=1, ge=0, le=1_000_000, description="Items judged before an agent counts as SUCCEEDED."
    )
    trial_items: int = Field(default=50, ge=0, le=100_000)
    trial_s: float = Field(default=60.0, gt=0.0, le=86_400.0)
    swap: Swap = Field(default=Swap.BELT_GAP, description="When a line changes over.")
    swap_within_s: float | None = Field(
        default=None, ge=0.0, le=86_400.0, description="Deadline of the changeover; empty = the line's own."
    )
    dynamic: bool = Field(default=False, description="Agents that match later join the last wave.")
    needs_approval: bool = Field(default=False, description="A second person must approve before anything happens.")
    jobExecutionsRolloutConfig: dict[str, Any] | None = Field(default=None, examples=[_RATE])  # noqa: N815
    abortConfig: dict[str, Any] | None = Field(default=None, examples=[_ABORT])  # noqa: N815
    timeoutConfig: dict[str, Any] | None = Field(default=None, examples=[{"inProgressTimeoutInMinutes": 100}])  # noqa: N815
    jobExecutionsRetryConfig: dict[str, Any] | None = Field(  # noqa: N815
        default=None, examples=[{"criteriaList": [{"failureType": "TIMED_OUT", "numberOfRetries": 1}]}]
    )
    schedulingConfig: dict[str, Any] | None = Field(default=None, examples=[_SCHEDULE])  # noqa: N815
    waveConfig: dict[str, Any] | None = Field(  # noqa: N815
        default=None, description="Success and error thresholds of each wave.", examples=[_WAVE]
    )
    budgetConfig: dict[str, Any] | None = Field(  # noqa: N815
        default=None,
        description="How many agents may be in change at once, in all and per value of a label.",
        examples=[{"maximumInChange": 20, "maximumPerLabel": {"site": 2}}],
    )
    actor: str = Actor


class Act(Strict):
    """Who acts, and why; kept with the rollout and in the audit trail."""

    reason: str = Field(default="", max_length=500)
    safe_state: SafeState = Field(
        default=SafeState.NONE,
        description="With abort and rollback: what agents without a way back do; empty = what they have committed.",
    )
    actor: str = Actor


class Exclude(Strict):
    """Agents that leave a rollout."""

    agents: list[str] = Field(min_length=1, max_length=5000)
    reason: str = Field(default="", max_length=500)
    actor: str = Actor


class NewLabels(Strict):
    """Labels of an agent."""

    labels: dict[str, str]
    actor: str = Actor


class NewLot(Strict):
    """Which lot runs from now on; what it means is said by the recipe."""

    lot: str = Field(max_length=64, pattern=_NAME, description="Empty = not known.", examples=["B-1182"])
    variety: str = Field(max_length=64, pattern=_NAME, description="As the recipe calls it.", examples=["gala"])
    reason: str = Field(default="", max_length=500)
    actor: str = Actor


class Forget(Strict):
    """An agent that is gone for good."""

    reason: str = Field(min_length=1, max_length=200)
    actor: str = Actor


class NewSafeState(Strict):
    """What a line does instead of judging."""

    safe_state: SafeState = Field(description="Empty = it judges with the bundle it has committed.")
    reason: str = Field(default="", max_length=500)
    actor: str = Actor


class NewToken(Strict):
    """Invite an agent."""

    actor: str = Actor


class Revoke(Strict):
    """End an identity."""

    reason: str = Field(min_length=1, max_length=200)
    actor: str = Actor


class NewTerms(Strict):
    """What grades pay and what mistakes cost, in the plant's currency per item; what is not said stays."""

    prices: dict[str, float] = Field(default_factory=dict, description="Grade -> what an item is paid for in it.")
    escaped: float | None = Field(default=None, description="A defective item among the good ones.")
    escaped_by_class: dict[str, float] = Field(default_factory=dict, description="The same for single classes.")
    wasted: float | None = Field(default=None, description="A good item among the bad, beyond the price lost.")
    misgraded: float | None = Field(default=None, description="A defective item in another defect's grade.")
    recirculated: float | None = Field(default=None, description="One more pass or one look of a person.")
    defect_share: float | None = Field(default=None, description="Expected share of defective items.")
    abstain_budget: float | None = Field(default=None, description="Share of items that may be unsure.")


class RecipeChange(Strict):
    """What shall be otherwise in a recipe."""

    terms: NewTerms = Field(default_factory=NewTerms)
    variety: str | None = Field(default=None, description="The terms are those of this variety.")
    lot: str | None = Field(default=None, description="The terms are those of this lot.")
    forget: bool = Field(default=False, description="The variety or lot shall have no terms of its own.")
    grades: dict[str, dict[str, Any]] = Field(
        default_factory=dict,
        description="Replace all grades.",
        examples=[{"first": {"outlet": "pass", "classes": ["sound"]}}],
    )
    outlets: dict[str, str] = Field(default_factory=dict, description="Grade -> outlet.")
    unsure_outlet: str | None = None
    late_outlet: str | None = None


class NewRecipe(RecipeChange):
    """A recipe change that makes a new version."""

    reason: str = Field(min_length=1, max_length=500)
    actor: str = Actor
