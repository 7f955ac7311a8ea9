"""The strict, frozen base of every part of the configuration."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

NUMBERS = (int, float, int | None, float | None)


class Section(BaseModel):
    """A part of the configuration: unknown keys, NaN and booleans given as numbers are errors."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )

    @model_validator(mode="before")
    @classmethod
    def _refuse_bool_as_number(cls, data: Any) -> Any:
        # Without this, pydantic reads `layers: true` as 1.
        wrong = [
            InitErrorDetails(
                type=PydanticCustomError("number", "should be a number"), loc=(key,), input=value
            )
            for key, value in (data.items() if isinstance(data, dict) else ())
            if isinstance(value, bool)
            and key in cls.model_fields
            and cls.model_fields[key].annotation in NUMBERS
        ]
        if wrong:
            raise ValidationError.from_exception_data(cls.__name__, wrong)
        return data
