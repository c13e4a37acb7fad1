"""docs/troubleshooting.md has a line for every reason that the code can give, and for no other."""

import ast
import re

from kubepeft.reasons import HINTS
from tests.cluster.build import REPOSITORY

PAGE = REPOSITORY / "docs" / "troubleshooting.md"
SERVER = {"NoSuchBucket", "RequestTimeTooSkewed", "SlowDown", "InternalError", "ServiceUnavailable"}
"""An S3 server's own words, which are passed on."""
WITHOUT_A_CLUSTER = {"BadManifest", "Suspended"}


def raised() -> set[str]:
    """The first argument of every UserError and TransientError, where it is a plain word."""
    found = set()
    for root in ("api/kubepeft", "jobs/kubepeft_jobs", "operator/kubepeft_operator"):
        for file in (REPOSITORY / root).rglob("*.py"):
            if "cli" in file.relative_to(REPOSITORY).parts:
                continue
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in (
                    "UserError",
                    "TransientError",
                ):
                    found |= words(node.args[0])
    return {reason for reason in found if re.fullmatch(r"[A-Z][A-Za-z0-9]+", reason)}


def words(node: ast.expr) -> set[str]:
    """The texts that an expression can be, as far as they stand there."""
    match node:
        case ast.Constant(value=str(text)):
            return {text}
        case ast.IfExp(body=first, orelse=second) | ast.BoolOp(values=[first, second]):
            return words(first) | words(second)
    return set()


def explained() -> set[str]:
    return set(re.findall(r"`([A-Z][a-z][A-Za-z0-9]+|OOMKilled)`", PAGE.read_text()))


def test_every_reason_is_explained() -> None:
    assert set(HINTS) | raised() <= explained()


def test_every_explained_reason_can_be_given() -> None:
    known = set(HINTS) | raised() | SERVER | WITHOUT_A_CLUSTER
    conditions_and_words = {"Stopped", "Disrupted", "Forbidden"}
    assert explained() - known - conditions_and_words == set()
