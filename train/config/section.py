"""What all configs are made of: sections of typed fields."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict

CONFIGS = Path(__file__).parents[1] / "configs"
Names = Annotated[list[str], BeforeValidator(lambda value: [value] if isinstance(value, str) else value)]
Paths = Names
StartMethod = Literal["fork", "spawn", "forkserver"] | None


class Section(BaseModel):
    """A group of fields that refuses unknown ones."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())
