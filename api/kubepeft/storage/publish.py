"""Publication: when a folder counts, who of several attempts wins, and how a reader knows that nothing was mixed.

A folder counts only by its manifest.json, which is written last and names every file with size and sha256. All
decisions are single conditional writes of small documents (Store.create, Store.replace); files are only ever
written where no other attempt writes, or are copies of the one attempt that holds the claim. Nothing here may
overwrite a document without naming what it expects to find there.

Two ways to publish:

  in place   FOLDER/attempts/DIGEST/ATTEMPT/…  and one create of FOLDER/manifest.json that points there.
  stable     for folders that other programs load as they stand (adapter/):
             1. stage  PARENT/.attempts/NAME/DIGEST/ATTEMPT/…; the caller may test that copy
             2. claim  PARENT/.claims/NAME.json, one conditional write that decides the winner
             3. finish copies the claimed files to FOLDER, reads them back, then creates FOLDER/manifest.json.
                Anyone who finds a claim without a manifest does step 3 again; the result is the same.

Overwriting changes the claim first, then puts a note in place of the manifest ("withdrawn"), so that the folder
counts as unpublished, and a finisher of the old claim who wakes up late can no longer publish it.
"""

import hashlib
import re
import secrets
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from pydantic.alias_generators import to_camel

from kubepeft.errors import TransientError, UserError
from kubepeft.storage.local import file_errors
from kubepeft.storage.store import Reader, Store, join, relative

MANIFEST = "manifest.json"
HASHERS = 4
CHUNK = 1 << 20
ATTEMPT_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}\Z")


def _relative_path(path: str) -> str:
    parts = PurePosixPath(path)
    if not path or parts.is_absolute() or ".." in parts.parts or str(parts) != path or "\\" in path:
        raise ValueError(f"not a relative path: {path!r}")
    return path


RelativePath = Annotated[str, AfterValidator(_relative_path)]


class Document(BaseModel):
    model_config = ConfigDict(frozen=True, alias_generator=to_camel, populate_by_name=True)

    def body(self) -> bytes:
        return self.model_dump_json(by_alias=True, indent=1).encode() + b"\n"


AnyDocument = TypeVar("AnyDocument", bound=Document)


class PublishedFile(Document):
    path: RelativePath
    size: Annotated[int, Field(ge=0)]
    """Bytes."""
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Manifest(Document):
    """What makes a folder count."""

    version: Literal[1] = 1
    digest: str
    """Of the specification that the content follows from."""
    attempt: str
    created_at: datetime
    lineage: dict[str, Any] = {}
    files_under: RelativePath | Literal[""] = ""
    """Where in the folder `files` lie: "" or the sub-folder of an attempt."""
    files: tuple[PublishedFile, ...]
    removes: tuple[RelativePath, ...] = ()
    """What this publication made obsolete; it may still be there if the publisher died."""

    def key(self, folder: str, file: PublishedFile) -> str:
        return join(folder, self.files_under, file.path)


class Claim(Manifest):
    """Who may fill a stable folder. `files_under` and `removes` are relative to the folder's parent."""

    overwrites: bool = False


class Withdrawn(Document):
    """Stands in place of a manifest while the folder is being overwritten."""

    withdrawn_for: str


@dataclass(frozen=True)
class Attempt:
    """One try to publish. `id` must never be used by another process."""

    id: str
    digest: str
    created_at: datetime
    lineage: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not ATTEMPT_ID.match(self.id) or not self.digest:
            raise ValueError(f"an attempt needs a digest and an id of letters, digits, '.', '_' and '-': {self.id!r}")

    @property
    def place(self) -> str:
        """DIGEST/ATTEMPT, as a key."""
        return f"{self._digest_folder}/{self.id}"

    @property
    def _digest_folder(self) -> str:
        return re.sub(r"[^A-Za-z0-9-]", "-", self.digest)[:64]

    def others_in(self, store: Reader, attempts_folder: str) -> tuple[str, ...]:
        """Keys that other attempts at the same digest left. If this one wins, those can only lose."""
        same_digest = join(attempts_folder, self._digest_folder)
        mine = join(attempts_folder, self.place) + "/"
        return tuple(entry.key for entry in store.entries(same_digest) if not entry.key.startswith(mine))


@dataclass(frozen=True)
class Staged:
    """An attempt whose files are uploaded, not yet claimed. They lie at `key` below the storage's root."""

    attempt: Attempt
    key: str
    files: tuple[PublishedFile, ...]
    abandoned: tuple[str, ...]

    def manifest(self) -> Manifest:
        """Describes the staged copy itself, so that it can be fetched with `fetch(store, staged.key, …)`."""
        return Manifest(
            digest=self.attempt.digest,
            attempt=self.attempt.id,
            created_at=self.attempt.created_at,
            lineage=dict(self.attempt.lineage),
            files=self.files,
        )

    def keys(self) -> list[str]:
        return [join(self.key, file.path) for file in self.files]


@dataclass(frozen=True)
class Published:
    """What now counts, and whether this very attempt published it."""

    manifest: Manifest
    won: bool


# --- Reading -------------------------------------------------------------------------------------------------------


def read_manifest(reader: Reader, folder: str) -> Manifest | None:
    """The folder's manifest, or None if the folder is not published.

    Raises UserError with reason CorruptManifest if there is a manifest that can't be understood.
    """
    document = _parse(reader, folder, reader.read(join(folder, MANIFEST)))
    return document if isinstance(document, Manifest) else None


def manifest_digest(reader: Reader, folder: str) -> str:
    """sha256 of the published folder's manifest.json, which stands for all its content; 64 hex digits."""
    body = reader.read(join(folder, MANIFEST))
    if body is None:
        raise UserError("NoSuchKey", "nothing is published there", where=reader.uri(folder), mend="publish it first")
    return hashlib.sha256(body).hexdigest()


def verify(reader: Reader, folder: str, manifest: Manifest) -> None:
    """Reads every file of the manifest and compares size and sha256.

    Raises UserError with reason ChangedBytes naming the first file that differs; TransientError with reason
    Overwritten if another manifest took this one's place meanwhile.
    """
    if difference := _first_difference(reader, folder, manifest):
        raise _changed(reader, folder, manifest, *difference)


def fetch(reader: Reader, folder: str, manifest: Manifest, dest: Path) -> None:
    """Downloads the manifest's files to `dest`, in parallel. None appears there before its size and sha256 are right;
    one that is there already and right is kept. Raises as `verify` does."""
    missing = [file for file in manifest.files if not _is_right(dest / file.path, file)]
    arriving = dest / f".fetch-{secrets.token_hex(6)}"
    try:
        try:
            reader.download({manifest.key(folder, file): arriving / file.path for file in missing})
        except UserError as error:
            for file in missing:
                if error.reason == "NoSuchKey" and reader.stat(manifest.key(folder, file)) is None:
                    raise _changed(reader, folder, manifest, file, "is missing") from error
            raise
        for file in missing:
            with file_errors(str(arriving / file.path)):
                size, sha256 = _hash_file(arriving / file.path)
            if wrong := _difference(file, size, sha256):
                raise _changed(reader, folder, manifest, file, wrong)
        for file in missing:
            with file_errors(str(dest / file.path)):
                (dest / file.path).parent.mkdir(parents=True, exist_ok=True)
                (arriving / file.path).replace(dest / file.path)
    finally:
        shutil.rmtree(arriving, ignore_errors=True)


def inventory(local_dir: Path) -> tuple[PublishedFile, ...]:
    """Every file below a local folder with its size in bytes and its sha256, ordered by path."""
    with file_errors(str(local_dir)):
        paths = sorted(path for path in local_dir.rglob("*") if path.is_file())
        with ThreadPoolExecutor(HASHERS) as pool:
            hashed = list(pool.map(_hash_file, paths))
    return tuple(
        PublishedFile(path=path.relative_to(local_dir).as_posix(), size=size, sha256=sha256)
        for path, (size, sha256) in zip(paths, hashed, strict=True)
    )


# --- Publishing in place -------------------------------------------------------------------------------------------


def publish_in_place(
    store: Store, folder: str, local_dir: Path, attempt: Attempt, *, overwrite: bool = False
) -> Published:
    """Publishes the files of `local_dir` as `folder`, unless that is published under the same digest already.

    Of several attempts exactly one wins; the others remove their files and get the winner's manifest. With
    `overwrite`, one write moves the readers from another digest's files to these. Raises UserError with reason
    OutputBelongsToAnotherSpec if the folder holds another digest.
    """
    key, attempts_folder = join(folder, MANIFEST), join(folder, "attempts")
    held = store.read(key)
    if existing := _same_digest(store, folder, held, attempt.digest, overwrite):
        obsolete = {join(folder, path) for path in existing.removes}
        if obsolete:
            store.delete(sorted(obsolete & {entry.key for entry in store.entries(attempts_folder)}))
        return Published(existing, won=existing.attempt == attempt.id)

    abandoned = attempt.others_in(store, attempts_folder)
    staged = _upload(store, join(attempts_folder, attempt.place), local_dir, attempt, abandoned)
    while True:
        before = _parse(store, folder, held)
        replaced = [before.key(folder, file) for file in before.files] if isinstance(before, Manifest) else []
        obsolete = {*abandoned, *replaced}
        manifest = staged.manifest().model_copy(
            update={
                "files_under": relative(folder, staged.key),
                "removes": tuple(sorted(relative(folder, path) for path in obsolete)),
            }
        )
        if _write(store, key, manifest.body(), over=held):
            store.delete(sorted(obsolete))
            return Published(manifest, won=True)
        held = store.read(key)
        try:
            existing = _same_digest(store, folder, held, attempt.digest, overwrite)
        except UserError:
            store.delete(staged.keys())
            raise
        if existing:
            if existing.attempt != attempt.id:
                store.delete(staged.keys())
            return Published(existing, won=existing.attempt == attempt.id)


# --- Publishing to a stable folder ---------------------------------------------------------------------------------


def recover(store: Store, folder: str, digest: str, *, overwrite: bool = False) -> Manifest | None:
    """What is published at a stable folder under this digest; None if the work is still to be done.

    A claim whose winner died is finished here. Ask this before doing the work: it raises UserError with reason
    OutputBelongsToAnotherSpec if the folder belongs to another digest and `overwrite` is not set.
    """
    while True:
        existing = _same_digest(store, folder, store.read(join(folder, MANIFEST)), digest, overwrite)
        body = store.read(_claim_key(folder))
        if body is None:
            return existing
        claim = _parse_claim(store, folder, body)
        if existing:
            if claim.attempt == existing.attempt:  # its publisher may have died before it cleaned up
                store.delete([entry.key for entry in store.entries(join(_parent(folder), claim.files_under))])
            return existing
        if claim.digest != digest:
            if overwrite or _is_dead(store, folder, claim):
                return None
            raise _belongs_to_another(store.uri(folder), claim.digest, digest)
        try:
            return _finish(store, folder, claim, body)
        except _FilesGoneError:
            return None
        except _SupersededError:
            continue


def stage(store: Store, folder: str, local_dir: Path, attempt: Attempt) -> Staged:
    """Uploads the files of `local_dir` beside the stable folder, where only this attempt writes."""
    attempts_folder = join(_parent(folder), ".attempts", _name(folder))
    abandoned = attempt.others_in(store, attempts_folder)
    return _upload(store, join(attempts_folder, attempt.place), local_dir, attempt, abandoned)


def fetch_staged(store: Store, folder: str, staged: Staged, dest: Path) -> None:
    """Downloads the staged copy, to test it before the claim. Raises as `fetch` does; TransientError with reason
    AnotherAttemptWon if it was removed because another attempt at the same digest has published."""
    try:
        fetch(store, staged.key, staged.manifest(), dest)
    except UserError as error:
        if store.read(_claim_key(folder)) is not None and store.stat(staged.keys()[0]) is None:
            raise TransientError(
                "AnotherAttemptWon",
                "another attempt published first",
                where=store.uri(folder),
                mend="run the stage again",
            ) from error
        raise


def discard(store: Store, staged: Staged) -> None:
    """Removes a staged copy that failed its test."""
    store.delete(staged.keys())


def claim_and_finish(store: Store, folder: str, staged: Staged, *, overwrite: bool = False) -> Published:
    """Claims the stable folder for the staged copy, and publishes whatever the claim then says.

    Of several attempts exactly one wins; the others remove their staged copies and get the winner's manifest.
    Raises UserError with reason OutputBelongsToAnotherSpec if the folder belongs to another digest and `overwrite`
    is not set, or if an overwriting attempt at another digest takes the claim away.
    """
    try:
        return _claim_and_finish(store, folder, staged, overwrite)
    except UserError as error:
        if error.reason == "OutputBelongsToAnotherSpec":
            discard(store, staged)
        raise


def _claim_and_finish(store: Store, folder: str, staged: Staged, overwrite: bool) -> Published:
    digest, mine = staged.attempt.digest, staged.attempt.id
    while True:
        held = store.read(join(folder, MANIFEST))
        if existing := _same_digest(store, folder, held, digest, overwrite):
            if existing.attempt != mine:
                discard(store, staged)
            return Published(existing, won=existing.attempt == mine)

        body = store.read(_claim_key(folder))
        before = _parse_claim(store, folder, body) if body is not None else None
        if before and body and before.attempt == mine:
            claim, written = before, body
            break
        if before and body and before.digest == digest:
            try:
                manifest = _finish(store, folder, before, body)
                discard(store, staged)
                return Published(manifest, won=False)
            except _SupersededError:
                continue
            except _FilesGoneError:
                pass
        elif before and not overwrite and not _is_dead(store, folder, before):
            raise _belongs_to_another(store.uri(folder), before.digest, digest)
        claim = _claim(folder, staged, before, _parse(store, folder, held))
        written = claim.body()
        if _write(store, _claim_key(folder), written, over=body):
            break

    try:
        manifest = _finish(store, folder, claim, written)
    except _SupersededError:
        return _taken_away(store, folder, staged)
    except _FilesGoneError:
        raise TransientError(
            "StagedFilesGone", "the uploaded files were removed or damaged before they were published",
            where=store.uri(staged.key), mend="run the stage again",
        ) from None  # fmt: skip
    return Published(manifest, won=True)


def _claim(folder: str, staged: Staged, before: Claim | None, held: "Manifest | Withdrawn | None") -> Claim:
    parent, name = _parent(folder), _name(folder)
    removes = {relative(parent, key) for key in staged.abandoned}
    if before:
        removes.update(before.removes)
        removes.update(join(before.files_under, file.path) for file in before.files)
        removes.update(join(name, file.path) for file in before.files)
    if isinstance(held, Manifest):
        removes.update(join(name, held.files_under, file.path) for file in held.files)
    removes.difference_update(join(name, file.path) for file in staged.files)
    return Claim(
        **staged.manifest().model_dump(exclude={"files_under", "removes"}),
        files_under=relative(parent, staged.key),
        removes=tuple(sorted(removes)),
        overwrites=before is not None or held is not None,
    )


def _finish(store: Store, folder: str, claim: Claim, body: bytes) -> Manifest:
    """Carries a claim out: remove what the claims before it left, copy, read back, write the manifest.

    May be run by several processes at once, and again after a kill at any point. The manifest is read before the
    claim is checked and written on condition that it is still what was read, so a finisher whose claim has been
    overwritten cannot publish it.
    """
    parent, key = _parent(folder), join(folder, MANIFEST)
    manifest = Manifest(**claim.model_dump(exclude={"files_under", "removes", "overwrites"}))
    sources = {join(parent, claim.files_under, file.path): join(folder, file.path) for file in claim.files}
    withdrawn = Withdrawn(withdrawn_for=claim.attempt).body()
    while True:
        held = store.read(key)
        document = _parse(store, folder, held)
        if isinstance(document, Manifest) and document.attempt == claim.attempt:
            store.delete(sources)
            return document
        if store.read(_claim_key(folder)) != body:
            raise _SupersededError
        if (claim.overwrites or held is not None) and held != withdrawn:
            if not _write(store, key, withdrawn, over=held):
                continue
            held = withdrawn
        store.delete([join(parent, path) for path in claim.removes])
        if not _copied(store, folder, manifest, sources):
            if store.read(key) != held or store.read(_claim_key(folder)) != body:
                continue  # another finisher was faster and removed the sources, or the claim is no longer in force
            raise _FilesGoneError
        if _write(store, key, manifest.body(), over=held):
            store.delete(sources)
            return manifest


def _copied(store: Store, folder: str, manifest: Manifest, sources: Mapping[str, str]) -> bool:
    """Whether the copies lie at the stable path and are right. A late finisher of an older claim can spoil one while
    it is on its way, so a wrong one is copied again."""
    for _ in range(3):
        try:
            store.copy(sources)
        except UserError as error:
            if error.reason != "NoSuchKey":
                raise
            return False
        if not _first_difference(store, folder, manifest):
            return True
    return False


class _SupersededError(Exception):
    """The claim that was being finished is no longer in force."""


class _FilesGoneError(Exception):
    """The claimed attempt's files are gone or damaged, so its claim can never be carried out."""


def _taken_away(store: Store, folder: str, staged: Staged) -> Published:
    existing = read_manifest(store, folder)
    if existing and existing.digest == staged.attempt.digest:
        return Published(existing, won=existing.attempt == staged.attempt.id)
    body = store.read(_claim_key(folder))
    other = _parse_claim(store, folder, body).digest if body else "unknown"
    raise _belongs_to_another(store.uri(folder), other, staged.attempt.digest)


def _is_dead(store: Store, folder: str, claim: Claim) -> bool:
    """Nothing is published under the claim, and its files are gone: somebody has removed the output by hand."""
    if store.read(join(folder, MANIFEST)) is not None:
        return False
    return any(store.stat(join(_parent(folder), claim.files_under, file.path)) is None for file in claim.files)


def _same_digest(store: Reader, folder: str, held: bytes | None, digest: str, overwrite: bool) -> Manifest | None:
    document = _parse(store, folder, held)
    if not isinstance(document, Manifest):
        return None
    if document.digest == digest:
        return document
    if overwrite:
        return None
    raise _belongs_to_another(store.uri(folder), document.digest, digest)


def _belongs_to_another(where: str, theirs: str, ours: str) -> UserError:
    return UserError(
        "OutputBelongsToAnotherSpec",
        f"this folder holds the output of another spec (digest {theirs}, this one is {ours})",
        where=where,
        mend="give another output.uri, or set output.overwrite: true to replace it",
    )


def _upload(store: Store, key: str, local_dir: Path, attempt: Attempt, abandoned: tuple[str, ...]) -> Staged:
    files = inventory(local_dir)
    if not files:
        raise ValueError(f"nothing to publish in {local_dir}")
    if any(file.path == MANIFEST for file in files):
        raise ValueError(f"{MANIFEST} is written by publication itself: {local_dir}")
    store.upload({join(key, file.path): local_dir / file.path for file in files})
    return Staged(attempt, key, files, abandoned)


def _write(store: Store, key: str, data: bytes, *, over: bytes | None) -> bool:
    return store.create(key, data) if over is None else store.replace(key, data, expected=over)


def _parse(reader: Reader, folder: str, body: bytes | None) -> Manifest | Withdrawn | None:
    if body is None:
        return None
    if b'"withdrawnFor"' in body[:200]:
        return _validated(Withdrawn, body, reader.uri(join(folder, MANIFEST)))
    return _validated(Manifest, body, reader.uri(join(folder, MANIFEST)))


def _parse_claim(reader: Reader, folder: str, body: bytes) -> Claim:
    return _validated(Claim, body, reader.uri(_claim_key(folder)))


def _validated(model: type[AnyDocument], body: bytes, where: str) -> AnyDocument:
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        first = error.errors()[0]
        at = ".".join(str(part) for part in first["loc"]) or "the document"
        raise UserError(
            "CorruptManifest",
            f"it can't be understood: {at}: {first['msg']}",
            where=where,
            mend="it was changed by hand or written by a newer kubepeft; remove it to publish again",
        ) from error


def _claim_key(folder: str) -> str:
    return join(_parent(folder), ".claims", f"{_name(folder)}.json")


def _parent(folder: str) -> str:
    return folder.strip("/").rpartition("/")[0]


def _name(folder: str) -> str:
    return folder.strip("/").rpartition("/")[2]


def _first_difference(reader: Reader, folder: str, manifest: Manifest) -> tuple[PublishedFile, str] | None:
    def check(file: PublishedFile) -> str:
        try:
            with reader.open(manifest.key(folder, file)) as stream:
                return _difference(file, *_hash(stream))
        except UserError as error:
            if error.reason != "NoSuchKey":
                raise
            return "is missing"

    with ThreadPoolExecutor(HASHERS) as pool:
        for file, wrong in zip(manifest.files, pool.map(check, manifest.files), strict=True):
            if wrong:
                return file, wrong
    return None


def _changed(reader: Reader, folder: str, manifest: Manifest, file: PublishedFile, wrong: str) -> Exception:
    where = reader.uri(manifest.key(folder, file))
    now = reader.read(join(folder, MANIFEST))
    if now is not None and _parse(reader, folder, now) != manifest:
        return TransientError(
            "Overwritten", "the folder was published anew while it was read", where=where, mend="try again"
        )
    return UserError(
        "ChangedBytes", f"the file {wrong}", where=where, mend="publish it again; somebody or something changed it"
    )


def _difference(file: PublishedFile, size: int, sha256: str) -> str:
    if size != file.size:
        return f"has {size} bytes, and its manifest says {file.size}"
    if sha256 != file.sha256:
        return f"has sha256 {sha256}, and its manifest says {file.sha256}"
    return ""


def _is_right(path: Path, file: PublishedFile) -> bool:
    return path.is_file() and path.stat().st_size == file.size and _hash_file(path)[1] == file.sha256


def _hash_file(path: Path) -> tuple[int, str]:
    with open(path, "rb") as stream:
        return _hash(stream)


def _hash(stream: Any) -> tuple[int, str]:
    digest, size = hashlib.sha256(), 0
    while chunk := stream.read(CHUNK):
        digest.update(chunk)
        size += len(chunk)
    return size, digest.hexdigest()
