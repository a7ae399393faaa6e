"""The base of the sections of a recipe, and the types of their keys."""

import os
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

Count = Annotated[int, Field(ge=1, le=2**31 - 1)]
LargeCount = Annotated[int, Field(ge=1, le=10**15)]
Ratio = Annotated[float, Field(ge=0, le=1)]
Name = Annotated[str, Field(min_length=1)]
PathName = Annotated[Name, AfterValidator(os.path.expanduser)]  # `~` is the home folder


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, protected_namespaces=(), allow_inf_nan=False)
