"""What follows from the types: the CRDs, the reference page, and their being fresh."""

from typing import Any

import pytest
import yaml

from kubepeft import crd
from tests.generated import stale


def test_no_generated_file_is_stale() -> None:
    assert stale() == [], "run: make generate"


def nodes(schema: Any, path: str = "") -> list[tuple[str, dict[str, Any]]]:
    """Every schema node with its path."""
    found = [(path, schema)]
    for name, inner in schema.get("properties", {}).items():
        found += nodes(inner, f"{path}.{name}")
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), dict):
            found += nodes(schema[key], f"{path}[]")
    return found


@pytest.mark.parametrize(
    "definition", list(yaml.safe_load_all(crd.to_yaml())), ids=lambda one: one["spec"]["names"]["kind"]
)
def test_a_definition_is_structural_and_bounded(definition: dict[str, Any]) -> None:
    schema = definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    for path, node in nodes(schema):
        assert not {"$ref", "anyOf", "oneOf", "allOf", "title", "const", "$defs"} & set(node), path
        if "properties" in node:
            assert node.get("default", {}) == {}, path  # the server refuses nulls in a default
        for bound in ("minimum", "maximum"):
            assert not isinstance(node.get(bound), bool), path
            assert isinstance(node.get(f"exclusive{bound.title()}", True), bool), path
        assert "type" in node or "x-kubernetes-int-or-string" in node, path
        if path.startswith(".spec"):
            # Bounds keep the cost of CEL rules, which compare whole fields, within what the API server grants.
            if node.get("type") == "string" and "enum" not in node:
                assert "maxLength" in node, path
            if node.get("type") == "array":
                assert "maxItems" in node, path
            if "additionalProperties" in node:
                assert "maxProperties" in node, path


def test_columns_are_those_people_look_for() -> None:
    fine_tune = next(iter(yaml.safe_load_all(crd.to_yaml())))
    names = [column["name"] for column in fine_tune["spec"]["versions"][0]["additionalPrinterColumns"]]
    assert names == ["Phase", "Method", "Model", "Progress", "Loss", "ETA", "Age"]
    assert fine_tune["spec"]["names"]["shortNames"] == ["ft"]
    assert fine_tune["spec"]["names"]["categories"] == ["ai"]


def test_every_field_of_the_spec_but_three_is_fixed_at_creation() -> None:
    fine_tune = next(iter(yaml.safe_load_all(crd.to_yaml())))
    schema = fine_tune["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    (rule,) = schema["x-kubernetes-validations"]
    spec = schema["properties"]["spec"]
    free = {name for name in spec["properties"] if f"self.spec.{name} == oldSelf.spec.{name}" not in rule["rule"]}
    assert free == {"suspend", "ttlSecondsAfterFinished", "activeDeadlineSeconds"}


def test_the_reference_names_every_field() -> None:
    page = crd.reference()
    for definition in crd.definitions():
        for path, _ in nodes(definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]):
            name = path.rpartition(".")[2].replace("[]", "")
            assert not name or f"`{name}`" in page, path
