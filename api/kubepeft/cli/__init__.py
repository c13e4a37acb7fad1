"""The kubepeft command. Only words and options stand here; what a command needs is imported when it runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NoReturn

import click

from kubepeft import __version__
from kubepeft.errors import KubepeftError, UserError

MANIFEST = click.argument("manifest", type=click.Path(path_type=Path))


def main() -> NoReturn:
    """Entry point: a KubepeftError becomes its message on standard error and its exit code."""
    try:
        code = cli.main(standalone_mode=False)
    except click.exceptions.Abort:
        sys.exit(130)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except KubepeftError as error:
        click.echo(f"{click.style('Error', fg='red')} {error.reason}\n{error}", err=True)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        sys.exit(141)
    sys.exit(code or 0)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="kubepeft")
def cli() -> None:
    """Fine-tune language models in batch: one manifest from data to adapter to predictions."""


@cli.command()
@MANIFEST
@click.option("--until", type=click.Choice(["prepare", "train", "infer"]), help="Stop after this stage.")
@click.option("-q", "--quiet", is_flag=True, help="Only the table at the end, and errors.")
@click.option(
    "--mount", "mounts", multiple=True, metavar="CLAIM=DIR", help="Read and write pvc://CLAIM in this folder."
)
def run(manifest: Path, until: str | None, quiet: bool, mounts: tuple[str, ...]) -> int:
    """Run the documents of MANIFEST on this machine, without a cluster.

    What an earlier run has finished is kept; what was interrupted goes on from its last checkpoint.
    """
    from kubepeft.cli.run import run_manifest

    for mount in mounts:
        if "=" not in mount:
            raise click.BadParameter(f"expected CLAIM=DIR, found {mount!r}", param_hint="--mount")
    folders = {claim: str(Path(folder).absolute()) for claim, _, folder in (mount.partition("=") for mount in mounts)}
    return run_manifest(manifest, until=until, quiet=quiet, mounts=folders)


@cli.command()
@click.argument("manifests", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--cluster", is_flag=True, help="Refuse file:// and plain paths too, which a cluster can't read.")
def validate(manifests: tuple[Path, ...], cluster: bool) -> int:
    """Check MANIFESTS as the API server would; nothing is run and nothing is fetched."""
    failed = 0
    for path in manifests:
        try:
            found = load_manifest(path, local=not cluster)
        except UserError as error:
            failed = error.exit_code
            click.echo(f"{error}", err=True)
            continue
        for one in found:
            click.echo(f"{path}: {one.kind} {one.metadata.name} is valid")
    return failed


@cli.command()
@click.option("--reference", is_flag=True, help="The manifest reference (Markdown) in place of the definitions.")
def crd(reference: bool) -> None:
    """Print the CustomResourceDefinitions as YAML."""
    from kubepeft import crd as definitions

    click.echo(definitions.reference() if reference else definitions.to_yaml(), nl=False)


@cli.command()
@click.argument("output")
@click.option("-o", "--save", type=click.Path(path_type=Path), help="Also save report.html to this file.")
def report(output: str, save: Path | None) -> None:
    """Say what a run has published under OUTPUT (an output.uri or a folder), and where its report is."""
    from kubepeft.cli.report import show_report

    show_report(output, save)


NAME = click.argument("name")
NAMESPACE = click.option("-n", "--namespace", help="Default: the current context's.")


@cli.command()
@NAME
@NAMESPACE
@click.option("-w", "--watch", is_flag=True, help="Until it has ended; exits with 1 if it failed.")
def status(name: str, namespace: str | None, watch: bool) -> int:
    """Say how the FineTune or BatchInference NAME stands, and why it does not run."""
    from kubepeft.cli.cluster import show_status

    return show_status(name, namespace, watch=watch)


@cli.command()
@NAME
@NAMESPACE
@click.option("--stage", type=click.Choice(["prepare", "train", "infer"]), help="The newest pod of this stage.")
@click.option("-f", "--follow", is_flag=True, help="As it grows.")
def logs(name: str, namespace: str | None, stage: str | None, follow: bool) -> int:
    """Print the log of the newest pod of NAME."""
    from kubepeft.cli.cluster import show_logs

    return show_logs(name, namespace, stage=stage, follow=follow)


@cli.command()
@NAME
@NAMESPACE
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
def cancel(name: str, namespace: str | None, yes: bool) -> int:
    """Delete NAME; its pods save and end, and what it has published stays."""
    from kubepeft.cli.cluster import cancel

    return cancel(name, namespace, sure=lambda question: yes or click.confirm(question))


def load_manifest(path: Path, *, local: bool) -> list:  # type: ignore[type-arg]
    """The documents of a manifest file, or of standard input for "-"."""
    from kubepeft import manifest

    try:
        text = sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()
        return manifest.load(text.decode(), str(path), local=local)
    except FileNotFoundError:
        raise UserError("NoSuchFile", "no such file", where=str(path), mend="give the path of a manifest") from None
    except IsADirectoryError:
        raise UserError(
            "NoSuchFile", "is a folder", where=str(path), mend="give the path of a manifest in it"
        ) from None
    except UnicodeDecodeError as error:
        raise UserError(
            "BadManifest", f"not UTF-8 at byte {error.start}", where=str(path), mend="save the manifest as UTF-8"
        ) from None
