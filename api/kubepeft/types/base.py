"""How every kubepeft type is written: camelCase outside, strict, and each rule said once for pydantic and for CEL.

Nothing here knows what a FineTune is, and nothing here reads a file.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    ValidationInfo,
    WithJsonSchema,
    model_validator,
)
from pydantic.alias_generators import to_camel
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, core_schema

LOCAL = {"local": True}
"""Validation context of a manifest that runs without a cluster: file:// and relative paths are allowed."""


@dataclass(frozen=True)
class Rule:
    """One rule of a type, held here by `check` and on the API server by `cel`, with the same words.

    Stands in `Annotated[...]` for a rule of one value, or in a Type's `rules` for one of several fields.
    A `cluster_only` rule is not held for a manifest that runs without a cluster.
    """

    message: str
    cel: str
    check: Callable[[Any], bool]
    cluster_only: bool = False

    def hold(self, value: Any, info: ValidationInfo) -> Any:
        local = bool(info.context and info.context.get("local"))
        if not (self.cluster_only and local) and not self.check(value):
            raise ValueError(self.message)
        return value

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.with_info_after_validator_function(self.hold, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        found = handler(schema)
        found.setdefault("x-kubernetes-validations", []).append(self.schema())
        return found

    def schema(self) -> dict[str, str]:
        """The rule as an entry of x-kubernetes-validations."""
        return {"rule": self.cel, "message": self.message}


class Type(BaseModel):
    """A part of a manifest: unknown fields and silent conversions are refused."""

    # Built when first used: a type within another is then built once, and the command starts sooner.
    model_config = ConfigDict(alias_generator=to_camel, extra="forbid", strict=True, frozen=True, defer_build=True)
    rules: ClassVar[tuple[Rule, ...]] = ()

    @model_validator(mode="after")
    def _hold_rules(self, info: ValidationInfo) -> Self:
        for rule in self.rules:
            rule.hold(self, info)
        return self

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        found = handler.resolve_ref_schema(handler(schema))
        if cls.rules:
            found["x-kubernetes-validations"] = [rule.schema() for rule in cls.rules]
        return found

    def to_json(self, *, defaults: bool = True) -> dict[str, Any]:
        """Plain JSON data under the manifest's own names; without `defaults`, only what differs from them."""
        return self.model_dump(mode="json", by_alias=True, exclude_defaults=not defaults, exclude_none=True)


FreeForm = Annotated[dict[str, Any], WithJsonSchema({"type": "object", "x-kubernetes-preserve-unknown-fields": True})]
"""An object that another project's schema rules: kept as it is and checked by that project's own code."""

Quantity = Annotated[int | str, WithJsonSchema({"x-kubernetes-int-or-string": True})]
"""A Kubernetes quantity such as 2, "500m" or "16Gi"; the API server checks it when the pod is made."""

Name = Annotated[str, Field(min_length=1, max_length=253, pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$")]
"""The name of a Kubernetes object (RFC 1123 subdomain)."""

ShortText = Annotated[str, Field(min_length=1, max_length=256)]
Path = Annotated[str, Field(min_length=1, max_length=1024)]

LabelMap = Annotated[dict[str, Annotated[str, Field(max_length=63)]], Field(max_length=64)]
AnnotationMap = Annotated[dict[str, Annotated[str, Field(max_length=4096)]], Field(max_length=64)]
