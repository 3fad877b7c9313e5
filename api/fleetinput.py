"""A fleet as it may be sent: in our own words, or in CodeBuild's (CodeBuild: CreateFleet), which mean the same."""

from typing import Literal, Self

from pydantic import Field, ValidationError, model_validator

from millrace.fleet import MOST_WORKERS, FleetSettings, Scaling
from millrace.project import Shape


class TargetTracking(Shape):
    """CodeBuild: TargetTrackingScalingConfiguration."""

    metric_type: Literal["FLEET_UTILIZATION_RATE"] = "FLEET_UTILIZATION_RATE"
    target_value: float = Field(gt=0, le=100)


class ScalingConfiguration(Shape):
    """CodeBuild: ScalingConfigurationInput."""

    scaling_type: Literal["TARGET_TRACKING_SCALING"] = "TARGET_TRACKING_SCALING"
    target_tracking_scaling_configs: tuple[TargetTracking, ...] = Field(default=(), max_length=1)
    max_capacity: int | None = Field(default=None, ge=1, le=MOST_WORKERS)


class FleetInput(FleetSettings):
    """A fleet's settings; `baseCapacity` and `scalingConfiguration` stand for members of `scaling`, and are not sent with it."""

    base_capacity: int | None = Field(default=None, ge=1, le=MOST_WORKERS)
    scaling_configuration: ScalingConfiguration | None = None

    @model_validator(mode="after")
    def _words_agree(self) -> Self:
        if self.base_capacity is None and self.scaling_configuration is None:
            return self
        if "scaling" in self.model_fields_set:
            raise ValueError("scaling says the same as baseCapacity and scalingConfiguration: send one or the other")
        try:
            self._scaling()
        except ValidationError as error:
            raise ValueError("; ".join(item["msg"].removeprefix("Value error, ") for item in error.errors())) from error
        return self

    @property
    def is_limit_only(self) -> bool:
        """Whether it says nothing but how many builds may run, as it could be said before there were other settings."""
        return self.model_fields_set <= {"max_running"}

    @property
    def settings(self) -> FleetSettings:
        """In our own words."""
        given = {name: getattr(self, name) for name in FleetSettings.model_fields if name in self.model_fields_set}
        return FleetSettings(**{**given, "scaling": self._scaling()})

    def _scaling(self) -> Scaling:
        if self.base_capacity is None and self.scaling_configuration is None:
            return self.scaling
        tracking = self.scaling_configuration or ScalingConfiguration()
        base = self.base_capacity or 0
        configs = tracking.target_tracking_scaling_configs
        return Scaling(
            minimum=base,
            maximum=tracking.max_capacity if tracking.max_capacity is not None else max(base, 1),
            utilization_percent=configs[0].target_value if configs else None,
        )
