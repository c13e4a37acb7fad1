"""kubepeft report: what a run has published, in a few lines, from its manifests."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console

from kubepeft import storage
from kubepeft.cli.display import print_pairs, size
from kubepeft.errors import UserError
from kubepeft.storage.publish import read_manifest
from kubepeft.storage.store import join, relative


def show_report(output: str, save: Path | None) -> None:
    """Print what lies under an output.uri, and save its report.html where asked to.

    Raises:
        UserError: reason NothingPublished when there is no adapter.
    """
    location = storage.parse_uri(output, base_dir=Path.cwd(), where="OUTPUT")
    store = storage.open_store(location)
    manifest = read_manifest(store, join(location.path, "adapter"))
    if manifest is None:
        raise UserError(
            "NothingPublished",
            "no adapter is published there",
            where=str(location),
            mend="give the output.uri of a run that has trained; kubepeft run prints it",
        )
    lineage = manifest.lineage
    training = lineage["training"]
    share = training["trainableParameters"] / max(training["totalParameters"], 1)
    lines = [
        ("adapter", store.uri(join(location.path, "adapter"))),
        ("made", manifest.created_at.strftime("%Y-%m-%d %H:%M UTC")),
        ("method", f"{lineage['method']}, {lineage['task']}"),
        ("base", f"{lineage['baseModel']} at {lineage['baseModelCommit']}"),
        ("trained", f"{training['trainableParameters']:,} of {training['totalParameters']:,} parameters ({share:.2%})"),
        ("size", size(sum(file.size for file in manifest.files))),
        ("steps", f"{training['step']:,} of {training['totalSteps']:,}"),
    ]
    if training.get("evalLoss") is not None:
        lines.append(("eval loss", f"{training['evalLoss']:.4f} (base {training['baseEvalLoss']:.4f})"))
    for entry in store.entries(join(location.path, "predictions")):
        if relative(location.path, entry.key).endswith("/summary.json"):
            summary = json.loads(store.read(entry.key) or b"{}")
            answered = f"{summary['completed']:,} of {summary['total']:,} rows answered"
            lines.append(("predictions", f"{store.uri(entry.key.rpartition('/')[0])}  ({answered})"))
    page = store.read(join(location.path, "report.html"))
    if page is not None:
        lines.append(("report", store.uri(join(location.path, "report.html"))))
    print_pairs(Console(highlight=False, soft_wrap=True), lines)
    if save is not None:
        if page is None:
            raise UserError(
                "NothingPublished",
                "there is no report.html",
                where=str(location),
                mend="run the FineTune again: it is put back",
            )
        save.write_bytes(page)
