"""The CustomResourceDefinitions and the reference page, made from the types.

pydantic's JSON schema is not a structural schema: references are inlined, "or null" becomes "not required" (the API server drops
nulls before it validates), titles go, and `additionalProperties: false` goes because the API server prunes or refuses unknown fields itself.
https://kubernetes.io/docs/tasks/extend-kubernetes/custom-resources/custom-resource-definitions/#specifying-a-structural-schema
"""

from __future__ import annotations

from typing import Any

import yaml

from kubepeft.digest import CHANGEABLE
from kubepeft.types import GROUP, KINDS, VERSION
from kubepeft.types.base import Type

Schema = dict[str, Any]

NAMES = {
    "FineTune": {"plural": "finetunes", "singular": "finetune", "shortNames": ["ft"]},
    "BatchInference": {"plural": "batchinferences", "singular": "batchinference", "shortNames": ["bi"]},
}

COLUMNS = {
    "FineTune": [
        ("Phase", "string", ".status.phase"),
        ("Method", "string", ".status.method"),
        ("Model", "string", ".spec.model.uri"),
        ("Progress", "string", ".status.progress"),
        ("Loss", "number", ".status.training.loss"),
        ("ETA", "string", ".status.eta"),
        ("Age", "date", ".metadata.creationTimestamp"),
    ],
    "BatchInference": [
        ("Phase", "string", ".status.phase"),
        ("FineTune", "string", ".spec.adapter.fineTune"),
        ("Progress", "string", ".status.progress"),
        ("Completed", "integer", ".status.inference.completed"),
        ("Failed", "integer", ".status.inference.failed"),
        ("Age", "date", ".metadata.creationTimestamp"),
    ],
}

_DROPPED = ("title", "additionalProperties", "discriminator")


def definitions() -> list[Schema]:
    """The two CustomResourceDefinitions as plain data."""
    return [_definition(kind) for kind in KINDS]


def to_yaml() -> str:
    """Both definitions as YAML documents, byte for byte the same every time."""
    return "---\n".join(
        yaml.safe_dump(one, sort_keys=False, width=160, default_flow_style=False) for one in definitions()
    )


def _definition(kind: str) -> Schema:
    schema = structural(KINDS[kind])
    spec, status = schema["properties"]["spec"], schema["properties"]["status"]
    for field in (*spec["properties"].values(), *status["properties"].values()):
        if "properties" in field:
            # One owner for the whole field, which is fixed or the operator's: the API server then tracks it as one, not leaf by leaf.
            field["x-kubernetes-map-type"] = "atomic"
    schema["properties"] = {
        "apiVersion": {"type": "string"},
        "kind": {"type": "string"},
        "metadata": {"type": "object"},
        "spec": spec,
        "status": status,
    }
    schema["required"] = ["spec"]
    schema["x-kubernetes-validations"] = [_fixed_at_creation(spec)]
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{NAMES[kind]['plural']}.{GROUP}"},
        "spec": {
            "group": GROUP,
            "scope": "Namespaced",
            "names": {"kind": kind, "listKind": f"{kind}List", **NAMES[kind], "categories": ["ai"]},
            "versions": [
                {
                    "name": VERSION,
                    "served": True,
                    "storage": True,
                    "subresources": {"status": {}},
                    "additionalPrinterColumns": [
                        {"name": name, "type": column, "jsonPath": path} for name, column, path in COLUMNS[kind]
                    ],
                    "schema": {"openAPIV3Schema": schema},
                }
            ],
        },
    }


def _fixed_at_creation(spec: Schema) -> Schema:
    """No field but the changeable ones may appear, vanish or change.

    The API server evaluates rules at every write of the status too, and comparing a spec is most of such a write's cost. Through
    the status subresource nothing but the status can change, and through the object itself never the status: where it
    differs, the spec is the old one.
    """
    same = {}
    for name in spec["properties"]:
        if name in CHANGEABLE:
            continue
        mine, old = f"self.spec.{name}", f"oldSelf.spec.{name}"
        same[name] = f"{mine} == {old}"
        if name not in spec["required"]:
            # It can't bound the cost of `self.spec.?name`.
            same[name] = f"(has({mine}) ? has({old}) && {same[name]} : !has({old}))"
    may_change = f"(only {', '.join(CHANGEABLE)} may change); make a new object"
    changed = " + ".join(f"({rule} ? '' : '{name} ')" for name, rule in same.items())
    return {
        "rule": "has(self.status) && (!has(oldSelf.status) || self.status != oldSelf.status) || "
        + " && ".join(same.values()),
        "messageExpression": f"'fixed at creation: ' + {changed} + '{may_change}'",
        "message": f"a field that is fixed at creation {may_change}",
        "reason": "FieldValueForbidden",
        "fieldPath": ".spec",
    }


def structural(kind: type[Type]) -> Schema:
    """The structural OpenAPI v3 schema of a type."""
    found = kind.model_json_schema(by_alias=True)
    schema: Schema = _inlined(found, found.get("$defs", {}))
    return schema


def _inlined(node: Any, defs: Schema) -> Any:
    if isinstance(node, list):
        return [_inlined(item, defs) for item in node]
    if not isinstance(node, dict):
        return node
    node = dict(node)
    if reference := node.pop("$ref", None):
        node = {**defs[reference.rsplit("/", 1)[1]], **node}
    if "anyOf" in node:
        real = [choice for choice in node.pop("anyOf") if choice.get("type") != "null"]
        if len(real) != 1:
            raise TypeError(f"a structural schema has no unions: {real}")
        node = {**_inlined(real[0], defs), **node}
    if "const" in node:
        node["enum"] = [node.pop("const")]
    if not isinstance(node.get("exclusiveMinimum", True), bool):
        node["minimum"], node["exclusiveMinimum"] = node["exclusiveMinimum"], True
    if not isinstance(node.get("exclusiveMaximum", True), bool):
        node["maximum"], node["exclusiveMaximum"] = node["exclusiveMaximum"], True
    extra = node.get("additionalProperties")
    out = {
        key: _inlined(value, defs)
        for key, value in node.items()
        if key not in _DROPPED and key not in ("$defs", "properties", "enum", "default", "required")
    }
    if "properties" in node:
        out["properties"] = {name: _inlined(one, defs) for name, one in node["properties"].items()}
    for kept in ("enum", "required"):
        if kept in node:
            out[kept] = node[kept]
    default = node.get("default")
    if default is not None and any("default" in one for one in out.get("properties", {}).values()):
        out["default"] = {}  # the server fills in the defaults of the fields within
    elif default not in (None, [], {}) and "properties" not in out:
        out["default"] = default  # but nothing isn't spelled out in every object
    if isinstance(extra, dict):
        out["additionalProperties"] = _inlined(extra, defs)
    if "x-kubernetes-int-or-string" in out:
        out.pop("type", None)
    return out


def reference() -> str:
    """The manifest reference, Markdown: every field with type, default, bounds and meaning."""
    lines = [
        "# Manifest reference",
        "",
        "Made by `kubepeft crd --reference` from the types in `api/kubepeft/types`; a test fails when this page is stale.",
        "",
        f"`apiVersion: {GROUP}/{VERSION}`. Fields of a `spec` are fixed at creation, but for "
        + ", ".join(f"`{name}`" for name in CHANGEABLE)
        + ".",
        "",
    ]
    for kind in KINDS:
        schema = structural(KINDS[kind])
        lines += [f"## {kind}", "", schema.get("description", ""), ""]
        for part in ("spec", "status"):
            lines += _table(part, schema["properties"][part])
    return "\n".join(lines).rstrip() + "\n"


def _table(path: str, schema: Schema) -> list[str]:
    required = schema.get("required", [])
    lines = [f"### {path}", ""]
    if schema.get("description"):
        lines += [schema["description"], ""]
    lines += ["| field | type | default | meaning |", "| --- | --- | --- | --- |"]
    deeper = []
    for name, field in schema["properties"].items():
        inside = field.get("items", field)
        if inside.get("properties"):
            deeper.append((f"{path}.{name}{'[]' if 'items' in field else ''}", inside))
        meaning = _words(field)
        default = "**required**" if name in required else _default(field)
        lines.append(f"| `{name}` | {_kind(field)} | {default} | {meaning} |")
    rules = [rule["message"] for rule in schema.get("x-kubernetes-validations", [])]
    if rules:
        lines += ["", "Rules: " + "; ".join(rules) + "."]
    lines.append("")
    for inner_path, inner in deeper:
        lines += _table(inner_path, inner)
    return lines


def _words(field: Schema) -> str:
    words = field.get("description", "")
    rules = [rule["message"] for rule in field.get("x-kubernetes-validations", []) if "properties" not in field]
    words = "; ".join([part for part in [words, *rules] if part])
    return words.replace("|", "\\|").replace("\n", " ")


def _default(field: Schema) -> str:
    if "default" not in field or field["default"] in ({}, []) or "properties" in field:
        return ""
    value = field["default"]
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _kind(field: Schema) -> str:
    if "enum" in field:
        return " \\| ".join(f"`{value}`" for value in field["enum"])
    if field.get("x-kubernetes-int-or-string"):
        return "quantity"
    if field.get("type") == "array":
        return f"list of {_kind(field['items'])}"
    if field.get("type") == "object" and "additionalProperties" in field:
        return f"map to {_kind(field['additionalProperties'])}"
    kind = str(field.get("type", "object"))
    least, most = field.get("minimum"), field.get("maximum")
    bounds = []
    if least is not None:
        bounds.append(f"{'>' if field.get('exclusiveMinimum') else '≥'} {least:g}")
    if most is not None:
        bounds.append(f"{'<' if field.get('exclusiveMaximum') else '≤'} {most:g}")
    return f"{kind} ({', '.join(bounds)})" if bounds else kind
