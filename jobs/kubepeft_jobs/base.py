"""The base model: which one a URI means, where its files lie on this machine, and how it is loaded.

A base has a logical id, which adapters name (never a path of one machine), and a commit, which every stage after prepare must find again:
the hub's commit, or the digest of the files where there is no hub. torch is imported only to load weights.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kubepeft import storage
from kubepeft.errors import UserError
from kubepeft.storage.hub import HubStore, select_model_files
from kubepeft.storage.local import LocalStore
from kubepeft.storage.store import join, relative

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger("kubepeft.base")

AUTO_CLASSES = {"CAUSAL_LM": "AutoModelForCausalLM", "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM"}


@dataclass(frozen=True)
class Base:
    """A base model at one commit."""

    uri: str
    """As the manifest says it."""
    logical_id: str
    """What an adapter's base_model_name_or_path says: ORG/NAME, the path of a folder of this machine, or the URI elsewhere."""
    commit: str
    """40 hex digits."""
    on_hub: bool

    @classmethod
    def of_commit(cls, uri: str, commit: str) -> Base:
        """The base that prepare found, from the URI and the commit it reported; nothing is looked up."""
        location = storage.parse_uri(uri, where="spec.model.uri")
        if location.scheme == "hf":
            return cls(uri, location.root, commit, on_hub=True)
        return cls(uri, f"/{location.path}" if location.scheme == "file" else str(location), commit, on_hub=False)


def resolve(uri: str, *, mounts: Mapping[str, str], cache_dir: str | None) -> Base:
    """The base that the URI means now.

    Raises:
        UserError: no such repository, revision, bucket, folder; no access.
        TransientError: storage or hub out of reach.
    """
    location = storage.parse_uri(uri, where="spec.model.uri")
    reader = storage.open_reader(location, mounts=_folders(mounts), cache_dir=None)
    if isinstance(reader, HubStore):
        return Base.of_commit(uri, reader.commit)
    entries = {relative(location.path, entry.key): entry for entry in storage.find(reader, location.path)}
    needed = [entries[name] for name in select_model_files(entries, where=uri, code=True)]
    return Base.of_commit(uri, content_digest(reader, needed, location.path))


def content_digest(reader: storage.Reader, entries: Iterable[storage.Entry], folder: str = "") -> str:
    """40 hex digits that say whether stored files are still the same.

    A file on a disk is read for it, since its times say nothing of its content; elsewhere the etag or blob id stands for the content.
    """
    if isinstance(reader, LocalStore):
        entries = [replace(entry, version=_sha256(reader, entry.key)) for entry in entries]
    return storage.fingerprint(entries, folder)


def _sha256(reader: storage.Reader, key: str) -> str:
    with reader.open(key) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()  # type: ignore[arg-type]  # a file of this disk


def files(base: Base, *, mounts: Mapping[str, str], cache_dir: str | None, code: bool = False) -> Path:
    """The folder with the base's configuration, tokenizer and safetensors weights, fetched where it is not here yet.

    Raises:
        UserError: reason BaseChanged when the files are no longer those of the commit; NoSafetensors for pickled weights.
    """
    location = storage.parse_uri(base.uri, where="spec.model.uri")
    if base.on_hub:
        reader = storage.open_reader(location.at(base.commit), cache_dir=None)
        assert isinstance(reader, HubStore)
        return reader.snapshot(code=code)
    now = resolve(base.uri, mounts=mounts, cache_dir=cache_dir)
    if now.commit != base.commit:
        raise UserError(
            "BaseChanged",
            "the base model's files have changed since the data was prepared",
            where=base.uri,
            mend="put the former files back, or make a new object for the new model",
        )
    reader = storage.open_reader(location, mounts=_folders(mounts))
    names = select_model_files(
        (relative(location.path, entry.key) for entry in reader.entries(location.path)), where=base.uri, code=code
    )
    if location.scheme == "file":
        return Path("/") / location.path
    if location.scheme == "pvc":
        return Path(mounts[location.root]) / location.path
    folder = Path(cache_dir or Path.home() / ".cache/kubepeft/models") / base.commit
    if not (folder / ".complete").exists():
        folder.mkdir(parents=True, exist_ok=True)
        reader.download({join(location.path, name): folder / name for name in names})
        (folder / ".complete").touch()
    return folder


def texts(base: Base, *, mounts: Mapping[str, str], work: Path, code: bool = False) -> Path:
    """A folder with the base's configuration and tokenizer; weights are not fetched for it.

    Raises:
        UserError: reason NoSafetensors when there are no weights that training could load.
    """
    location = storage.parse_uri(base.uri, where="spec.model.uri")
    reader = storage.open_reader(location.at(base.commit) if base.on_hub else location, mounts=_folders(mounts))
    names = select_model_files(
        (relative(location.path, entry.key) for entry in reader.entries(location.path)), where=base.uri, code=code
    )
    light = [name for name in names if not name.endswith(".safetensors")]
    reader.download({join(location.path, name): work / name for name in light})
    return work


def weights_digest(folder: Path) -> str:
    """32 hex digits that tell one set of weights from another, wherever it lies and whatever carried it there.

    Of each safetensors file: its size, its header, and 32 blocks of 64 KiB spread over it. So it takes a moment for weights of any size;
    it tells models and their revisions apart, but is no guard against a forger.
    """
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as stream:
            size = path.stat().st_size
            header = 8 + int.from_bytes(stream.read(8), "little")
            stream.seek(0)
            digest.update(f"{size}\n".encode() + stream.read(min(header, size)))
            for number in range(32):
                stream.seek(header + (size - header) * number // 32)
                digest.update(stream.read(1 << 16))
    return digest.hexdigest()[:32]


def config(folder: Path, *, trust_remote_code: bool) -> PretrainedConfig:
    """The model's configuration.

    Raises:
        UserError: reason BadModel when transformers can't read it.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            "BadModel",
            _first_line(error),
            where=str(folder),
            mend="check that model.uri names the folder of a transformers model with its config.json"
            + ("" if trust_remote_code else "; a model that brings its own code needs model.trustRemoteCode: true"),
        ) from error


def check_task(model_config: PretrainedConfig, task: str, where: str) -> None:
    """Refuse a task that the architecture can't do.

    Raises:
        UserError: reason WrongTask.
    """
    import transformers

    auto = getattr(transformers, AUTO_CLASSES[task])
    other = "SEQ_2_SEQ_LM" if task == "CAUSAL_LM" else "CAUSAL_LM"
    if type(model_config) in auto._model_mapping or AUTO_CLASSES[task] in getattr(model_config, "auto_map", {}):
        return
    fits = type(model_config) in getattr(transformers, AUTO_CLASSES[other])._model_mapping
    raise UserError(
        "WrongTask",
        f"a {model_config.model_type} model can't do {task}",
        where=where,
        mend=f"set model.task: {other}" if fits else "take a causal or an encoder-decoder language model",
    )


TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
    "tekken.json",
    "*.tiktoken",
)


def check_tokenizer(folder: Path, where: str) -> None:
    """Refuse a model without tokenizer files: transformers would make an empty tokenizer from the model's type.

    Raises:
        UserError: reason NoTokenizer.
    """
    if not any(next(folder.glob(name), None) for name in TOKENIZER_FILES):
        raise UserError(
            "NoTokenizer",
            "there is no tokenizer beside the model",
            where=where,
            mend="put tokenizer.json and tokenizer_config.json into its folder",
        )


def tokenizer(folder: Path, *, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """The tokenizer beside the model.

    Raises:
        UserError: reason NoTokenizer.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            "NoTokenizer",
            f"its tokenizer can't be loaded: {_first_line(error)}",
            where=str(folder),
            mend="put tokenizer.json and tokenizer_config.json beside the model",
        ) from error


def dtype_of(wish: str, weights: torch.dtype | None = None) -> torch.dtype:
    """The type of the frozen weights: what the manifest says, or for auto bfloat16 where this machine computes in it."""
    import torch

    if wish != "auto":
        found: torch.dtype = getattr(torch, wish)
        return found
    if torch.cuda.is_available():
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return torch.bfloat16 if cpu_computes_bf16() else torch.float32


def cpu_computes_bf16() -> bool:
    """Whether the CPU multiplies bfloat16 in hardware (AVX512-BF16 or AMX)."""
    import torch

    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()) and any(
        feature in _cpu_flags() for feature in ("avx512_bf16", "amx_bf16", "bf16")
    )


def _cpu_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return set(
        next((line.split(":", 1)[1] for line in lines if line.lower().startswith(("flags", "features"))), "").split()
    )


def quantization_config(kind: str, compute: torch.dtype) -> Any:
    """transformers' BitsAndBytesConfig for int8 or nf4, or None."""
    if kind == "none":
        return None
    from transformers import BitsAndBytesConfig

    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=compute
    )


def load(
    folder: Path,
    task: str,
    dtype: torch.dtype,
    *,
    quantization: str = "none",
    trust_remote_code: bool = False,
    device: Any = None,
) -> PreTrainedModel:
    """The base model's weights, on `device` (the CPU where it is None).

    Raises:
        UserError: reason BadModel when the weights can't be loaded, QuantizationUnavailable where bitsandbytes can't run.
    """
    import transformers

    transformers.logging.disable_progress_bar()
    quantized = quantization_config(quantization, dtype)
    try:
        model = getattr(transformers, AUTO_CLASSES[task]).from_pretrained(
            folder,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            quantization_config=quantized,
            device_map={"": device} if device is not None and str(device) != "cpu" else None,
        )
    except ImportError as error:
        if quantized is None:
            raise
        raise UserError(
            "QuantizationUnavailable",
            _first_line(error),
            where="spec.model.quantization",
            mend="use the kubepeft image, or quantization: none",
        ) from error
    except (OSError, ValueError) as error:
        raise UserError(
            "BadModel",
            _first_line(error),
            where=str(folder),
            mend="check that the folder holds a whole transformers model",
        ) from error
    return model


def with_local_base(adapter: Path, base: Path, into: Path) -> Path:
    """A copy of an adapter folder whose config points at the base's folder on this machine; the weights are linked, not copied."""
    into.mkdir(parents=True)
    for file in adapter.iterdir():
        if file.name == "adapter_config.json":
            settings = json.loads(file.read_text())
            settings |= {"base_model_name_or_path": str(base), "revision": None}
            (into / file.name).write_text(json.dumps(settings, indent=2))
        elif file.is_dir():
            shutil.copytree(file, into / file.name, copy_function=_link)
        else:
            _link(file, into / file.name)
    return into


def _link(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _folders(mounts: Mapping[str, str]) -> dict[str, Path]:
    return {claim: Path(folder) for claim, folder in mounts.items()}


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
