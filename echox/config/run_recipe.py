"""Says what the recipe of every run has, of a stage or a vocoder, for what reports, tracks or starts a run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from echox.config.schema import ScalingConfig, TrackingConfig


class Schedule(Protocol):
    """How long a run is."""

    @property
    def steps(self) -> int:
        """Optimizer steps in all."""
        ...


class RunRecipe(Protocol):
    """A recipe, whatever it trains."""

    @property
    def name(self) -> str:
        """Folder of the run below its storage, and its name."""
        ...

    @property
    def stage(self) -> str:
        """What trains."""
        ...

    @property
    def scale(self) -> str:
        """A tag to compare runs by."""
        ...

    @property
    def storage(self) -> str:
        """Folder of runs, or URL."""
        ...

    @property
    def optim(self) -> Schedule:
        """Its optimizer."""
        ...

    @property
    def scaling(self) -> ScalingConfig:
        """The workers that it is meant for."""
        ...

    @property
    def tracking(self) -> TrackingConfig:
        """Where MLflow keeps it."""
        ...
