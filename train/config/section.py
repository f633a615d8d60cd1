"""What all configs are made of: sections of typed fields."""

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, model_validator

CONFIGS = Path(__file__).parents[1] / "configs"
Names = Annotated[list[str], BeforeValidator(lambda value: [value] if isinstance(value, str) else value)]
Paths = Names
StartMethod = Literal["fork", "spawn", "forkserver"] | None


class Section(BaseModel):
    """A group of fields that refuses unknown ones.

    Attributes
    ----------
    renamed : dict
        Names that fields had once, and what they are called now; both are read.
    """

    model_config = ConfigDict(extra="forbid", protected_namespaces=())
    renamed: ClassVar[dict[str, str]] = {}

    @classmethod
    def present_names(cls, values: dict) -> dict:
        """Return a mapping of fields under their names of today; of two names of one field, today's counts."""
        former = {cls.renamed[name]: value for name, value in values.items() if name in cls.renamed}
        for name, value in former.items():
            both = isinstance(value, dict) and isinstance(values.get(name), dict)
            former[name] = value | values[name] if both else values.get(name, value)
        return {name: value for name, value in values.items() if name not in cls.renamed} | former

    @model_validator(mode="before")
    @classmethod
    def take_former_names(cls, values):
        """Read fields under the names that they had once."""
        return cls.present_names(values) if cls.renamed and isinstance(values, dict) else values
