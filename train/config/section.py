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
    def present_key(cls, key: str) -> str:
        """Return a dotted key ("section.field") under its names of today."""
        name, dot, rest = key.partition(".")
        name = cls.renamed.get(name, name)
        inner = cls.section_of(name)
        return name + dot + (inner.present_key(rest) if inner else rest)

    @classmethod
    def section_of(cls, name: str) -> type["Section"] | None:
        """Return the type of a field that is a section itself, else None."""
        kind = cls.model_fields[name].annotation if name in cls.model_fields else None
        return kind if isinstance(kind, type) and issubclass(kind, Section) else None

    @classmethod
    def present_names(cls, values: dict) -> dict:
        """Return a mapping of fields under their names of today; of two names of one field, today's counts."""
        former = {cls.renamed[name]: value for name, value in values.items() if name in cls.renamed}
        for name, value in former.items():
            both = isinstance(value, dict) and isinstance(values.get(name), dict)
            former[name] = value | values[name] if both else values.get(name, value)
        values = {name: value for name, value in values.items() if name not in cls.renamed} | former
        inner = {name: cls.section_of(name) for name, value in values.items() if isinstance(value, dict)}
        return values | {name: kind.present_names(values[name]) for name, kind in inner.items() if kind}

    @model_validator(mode="before")
    @classmethod
    def take_former_names(cls, values):
        """Read fields under the names that they had once."""
        return cls.present_names(values) if isinstance(values, dict) else values
