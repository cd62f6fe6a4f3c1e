"""Where a model's files lie, and which of them hold the weights that an engine loads.

Transformers and vLLM agree on the choice but for one case: where a model comes in Mistral's own form too, vLLM loads that.
A plan is made with transformers, so that form counts only where there is no other.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from fnmatch import fnmatch
from pathlib import Path

from sdfp_vllm.errors import SdfpError

# The folder beside a model's files that may hold its plan.
BESIDE = "sdfp"
INDEX = "model.safetensors.index.json"
# Mistral's own form of weights that are there in the usual one as well.
_CONSOLIDATED = "consolidated*.safetensors"
# What a Trainer leaves beside the weights; vLLM passes over the same names.
_NOT_WEIGHTS = ("training_args.bin", "optimizer.bin", "optimizer.pt", "scheduler.pt", "scaler.pt")
# All of a repository that a tokenizer, a config or a model's own code may need.
_SMALL = ["*.json", "tokenizer*", "*.model", "*.tiktoken", "*.txt", "*.jinja", "*.py", f"{BESIDE}/*"]


def weight_names(names: Iterable[str], folder: Path) -> list[str]:
    """Chooses, from the files of a model, those with the weights that an engine loads; sorted.

    One form alone, the first of: safetensors, .bin, .pt. An index names its files, whether they are in `names` or not.

    Args:
        names: Paths inside the model's folder or repository.
        folder: Where the index lies, if `names` has one.

    Raises:
        SdfpError: If the index is damaged.
    """
    top = sorted(name for name in names if "/" not in name)
    safetensors = [name for name in top if name.endswith(".safetensors")]
    others = [
        name for name in top if name.endswith((".bin", ".pt")) and not name.endswith(_NOT_WEIGHTS)
    ]  # a checkpoint's name may stand before it: step-100-optimizer.bin
    if INDEX in top and (safetensors or not others):
        return _indexed(folder / INDEX)
    usual = [name for name in safetensors if not fnmatch(name, _CONSOLIDATED)]
    return (
        usual
        or safetensors
        or [name for name in others if name.endswith(".bin")]
        or [name for name in others if name.endswith(".pt")]
    )


def weight_files(folder: Path) -> list[Path]:
    """Lists the files of a model's folder that an engine loads weights from; none where there are no weights.

    Raises:
        SdfpError: If the index is damaged, or names a file that is not there.
    """
    files = [folder / name for name in weight_names((f.name for f in folder.iterdir()), folder)]
    for file in files:
        if not file.is_file():
            raise SdfpError(
                str(file),
                f"is not there, though {INDEX} names it",
                "Download the model again: it is there in part.",
            )
    return files


def resolve_model_dir(
    model: str,
    revision: str | None = None,
    download_dir: str | None = None,
    *,
    fetch: bool = True,
    weights: bool = True,
) -> Path:
    """Finds the local folder of `model`, a folder or a Hugging Face id, with all that an engine loads in it.

    An id leads where it leads the engine: to what the hub has under the revision now, and to the cache where the hub
    cannot be asked. What the cache lacks is downloaded.

    Args:
        revision: Branch, tag or commit of an id.
        download_dir: Cache of the hub's files; None for the user's.
        fetch: False looks into the cache alone.
        weights: False is content with the rest: config, tokenizer, code.

    Raises:
        SdfpError: If `model` is neither, its files come from elsewhere, or some are missing and cannot be had.
    """
    if os.path.isdir(model):
        folder = Path(model)
        if folder.resolve().parent.name == "snapshots":  # of a hub's cache: may be any part of the model
            _check_whole(folder, model, weights)
        return folder
    _refuse_elsewhere(model)
    why: Exception | None = None
    if fetch:
        try:
            return _fetched(model, revision, download_dir, weights)
        except SdfpError:
            raise
        except Exception as e:  # of the network, the hub, the disk: what is in the cache may do all the same
            why = e
    try:
        folder = _snapshot(model, revision, download_dir, [], local_files_only=True)
    except Exception as e:
        asked = asked_revision(revision)
        at = f" at revision {asked!r}" if asked else ""
        raise SdfpError(
            f"model {model!r}{at}",
            f"is neither a folder nor a Hugging Face model that can be fetched ({_told(why or e)})",
            "Give the path of a folder with config.json, or the id of a model you can reach.",
        ) from (why or e)
    _check_whole(folder, model, weights, why)
    return folder


def fetch_plan_files(repository: str, download_dir: str | None, names: Sequence[str]) -> Path:
    """Fetches plan files `names`, at the top of a Hugging Face repository or in its folder BESIDE; where they lie.

    Args:
        names: The plan's own file first.

    Raises:
        SdfpError: If the repository has none, or cannot be reached and is not in the cache.
    """
    from huggingface_hub import HfApi

    patterns = [f"{folder}{name}" for name in names for folder in ("", f"{BESIDE}/")]
    why: Exception | None = None
    try:
        HfApi().model_info(repository)  # raises at once where the hub cannot be asked
        snapshot = _snapshot(repository, None, download_dir, patterns)
    except Exception as e:  # of the network, the hub, the disk: what is in the cache may do all the same
        why = e
        try:
            snapshot = _snapshot(repository, None, download_dir, patterns, local_files_only=True)
        except Exception:
            raise SdfpError(
                f"plan {repository!r}",
                f"is neither a folder nor a Hugging Face repository that can be fetched ({_told(e)})",
                "Give a folder with plan.json, or the id of a repository that has one, at its top or in sdfp/.",
            ) from e
    for folder in (snapshot, snapshot / BESIDE):
        if (folder / names[0]).is_file():
            return folder
    known = f", as far as the cache knows: the hub cannot be asked ({_told(why)})" if why else ""
    raise SdfpError(
        f"plan {repository!r}",
        f"is a Hugging Face repository without plan.json, at its top or in sdfp/{known}",
        "Make a plan with `sdfp plan MODEL -o sdfp`, and upload that folder.",
    ) from why


def is_same_model(named: str, served: str) -> bool:
    """Whether two names lead to one model: equal, one folder, or an id and the snapshot of it that vLLM serves offline."""
    if named == served or (
        os.path.isdir(named) and os.path.isdir(served) and os.path.samefile(named, served)
    ):
        return True
    snapshots = Path(served).parent
    return snapshots.name == "snapshots" and snapshots.parent.name == "models--" + named.replace("/", "--")


def has_plan_beside(model: str, plan_file: str, revision: str | None, download_dir: str | None) -> bool:
    """Whether `model`, a folder or a Hugging Face id, has a plan beside its files; False where that cannot be known."""
    if os.path.isdir(model):
        return (Path(model) / BESIDE / plan_file).is_file()
    from huggingface_hub import HfApi, try_to_load_from_cache

    name = f"{BESIDE}/{plan_file}"
    try:
        cached = try_to_load_from_cache(model, name, cache_dir=download_dir, revision=revision)
        return isinstance(cached, str) or HfApi().file_exists(model, name, revision=revision)
    except Exception:  # of the network, the hub, or a name that is no id
        return False


def asked_revision(revision: str | None) -> str | None:
    """The revision as the user named it: vLLM hands on a resolved one, "main" also where none was named."""
    return getattr(revision, "initial", revision)


def _fetched(model: str, revision: str | None, download_dir: str | None, weights: bool) -> Path:
    """Downloads what is missing; weights in one form alone."""
    from huggingface_hub import HfApi

    hub = HfApi()
    # Raises at once where the hub cannot be asked; what follows would try for long.
    hub.model_info(model, revision=revision)
    folder = _snapshot(model, revision, download_dir, _SMALL)
    if weights:
        commit = folder.name  # a branch may move on in between
        names = weight_names(hub.list_repo_files(model, revision=commit), folder)
        if names:
            _snapshot(model, commit, download_dir, names)
    _check_whole(folder, model, weights)
    return folder


def _snapshot(
    model: str,
    revision: str | None,
    download_dir: str | None,
    patterns: list[str],
    local_files_only: bool = False,
) -> Path:
    from huggingface_hub import snapshot_download

    found = snapshot_download(
        model,
        revision=revision,
        cache_dir=download_dir,
        allow_patterns=patterns,
        local_files_only=local_files_only,
    )
    return Path(found)


def _check_whole(folder: Path, model: str, weights: bool, why: Exception | None = None) -> None:
    """Raises SdfpError if config.json, or `weights` where they are wanted, are missing in a folder of a hub's cache."""
    missing = [] if (folder / "config.json").is_file() else ["config.json"]
    try:
        if weights and not weight_files(folder):
            missing.append("weights")
    except SdfpError as e:
        missing.append(Path(e.where).name)
    if missing:
        asked = f" ({_told(why)})" if why else ""
        raise SdfpError(
            f"model {model!r}",
            f"has no {' and no '.join(missing)} in {folder}{asked}",
            "Fetch all of it with `hf download` where the hub can be reached; SDFP serves decoder-only language "
            "models saved by transformers.",
        ) from why


def _refuse_elsewhere(model: str) -> None:
    """Raises SdfpError for a name that leads to no hub of Hugging Face's kind, before anything is asked there."""
    if "://" in model:
        kind, way_out = "is in an object store, and a plan is tied to files at hand", "Copy it to a folder"
    elif model.endswith(".gguf") or ":" in model:
        kind, way_out = "names weights in GGUF", "Give the folder or id of the weights in transformers' form"
    elif os.path.isfile(model):
        kind, way_out = "is a file", "Give the folder that it lies in"
    elif os.environ.get("VLLM_USE_MODELSCOPE", "").strip().lower() in ("1", "true"):
        kind, way_out = "is looked for on ModelScope (VLLM_USE_MODELSCOPE)", "Download it to a folder"
    else:
        return
    raise SdfpError(f"model {model!r}", kind, f"{way_out}, and give that.")


def _indexed(index: Path) -> list[str]:
    """The files that an index names."""
    try:
        return sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise SdfpError(
            str(index), f"cannot be read ({type(e).__name__}: {e})", "Download the model again."
        ) from e


def _told(error: BaseException) -> str:
    """An error's kind and its first line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
