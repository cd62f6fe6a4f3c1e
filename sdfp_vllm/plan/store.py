"""Where plans lie, and how they are written, read and found.

A plan is a folder with `plan.json` and, where it has bridges, `bridges.safetensors`, and where its draft head is
restricted, `head.safetensors`. Nothing in it is executable; loading it reads no file outside the folder.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from sdfp_vllm.common.json_file import read_plan, write_atomically, write_plan
from sdfp_vllm.errors import PlanError, SdfpError
from sdfp_vllm.plan.fingerprint import Fingerprint, fingerprint, resolve_model_dir
from sdfp_vllm.plan.model_files import BESIDE, asked_revision, fetch_plan_files, is_same_model
from sdfp_vllm.plan.parcel import BRIDGE_FILE, HEAD_FILE, PLAN_FILE, PlanParcel
from sdfp_vllm.plan.schema import SCHEMA_VERSION, SkipPlan

# Owner and name, neither beginning as a path does.
_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def save_plan(
    plan: SkipPlan, folder: str | Path, tensors: bytes | None = None, head_tokens: bytes | None = None
) -> Path:
    """Writes `<folder>/plan.json` atomically (a reader sees the old plan or the new one) and returns its path.

    Args:
        tensors: Content of `bridges.safetensors`, given if and only if the plan has bridges. Written
            first: a reader in between finds that it is not the plan's, and is told so.
        head_tokens: The same for `head.safetensors` and a restricted head.

    Raises:
        PlanError: If the folder cannot be written.
    """
    if (tensors is None) != (plan.view.bridges is None):
        raise ValueError("a plan with bridges is saved with their tensors, one without has none")
    if (head_tokens is None) != (plan.view.head.tokens is None):
        raise ValueError("a plan with a restricted head is saved with its tensors, one without has none")
    folder = Path(folder)
    path = folder / PLAN_FILE
    beside = {BRIDGE_FILE: tensors, HEAD_FILE: head_tokens}
    for name, content in beside.items():
        if content is not None:
            write_atomically(folder / name, content)
    write_plan(plan, path)
    for name, content in beside.items():
        if content is None:
            (folder / name).unlink(missing_ok=True)  # of the plan that was here before
    return path


def load_parcel(
    path: str | Path, expected: Fingerprint | None = None, command: str = "sdfp plan MODEL"
) -> PlanParcel:
    """Reads and validates a plan, and the files beside it, from a plan folder or its plan.json.

    Args:
        expected: The served model's fingerprint; a plan for another model is refused.
        command: What makes a plan for that model.

    Raises:
        PlanError: Naming the file, the field and the way out. No other exception leaves here.
    """
    path = Path(path)
    if os.path.isdir(path):
        path = path / PLAN_FILE
    plan = read_plan(path, SkipPlan, SCHEMA_VERSION, command)
    if expected is not None and (differences := plan.fingerprint.differences(expected)):
        raise PlanError(
            str(path),
            "was made for another model: " + "; ".join(differences),
            f"Make one for this model with `{command}`, or serve the model the plan names.",
        )
    return PlanParcel.read(plan, path.parent)


def load_plan(path: str | Path, expected: Fingerprint | None = None) -> SkipPlan:
    """`load_parcel`'s plan: what lies beside it is checked as well."""
    return load_parcel(path, expected).plan


def plans_root() -> Path:
    """The per-user folder of plans: $SDFP_CACHE_DIR, else $XDG_CACHE_HOME/sdfp, else ~/.cache/sdfp.

    Raises:
        SdfpError: If the user has no home folder where one is needed, or another's, into which he may not look.
    """
    own = os.environ.get("SDFP_CACHE_DIR")
    root = Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "sdfp"
    try:
        root = root.expanduser()
        (root / "plans").exists()
    except (RuntimeError, OSError) as e:  # a container's random user, without HOME or with that of root
        why = "this user has no such home folder" if isinstance(e, RuntimeError) else f"{e.strerror or e}"
        raise SdfpError(f"cache folder {root}", why, "Set SDFP_CACHE_DIR to a folder of yours.") from e
    return root / "plans"


def default_plan_dir(fp: Fingerprint) -> Path:
    """Where `sdfp plan MODEL` writes and `--speculative-model sdfp` looks, by model fingerprint."""
    # By schema: another release's plan is one that is not there, not one that is damaged.
    return plans_root() / f"v{SCHEMA_VERSION}" / f"{fp.architecture}-{fp.sha256[:16]}"


def is_default_plan_dir(folder: Path, fp: Fingerprint) -> bool:
    """Whether `--speculative-model sdfp` finds the plan in this folder; never without a home folder."""
    try:
        return folder.resolve() == default_plan_dir(fp).resolve()
    except SdfpError:
        return False


def find_plan(
    model: str,
    plan: str | Path | None = None,
    revision: str | None = None,
    download_dir: str | None = None,
) -> PlanParcel:
    """Loads the plan at `plan`; without it the one that `sdfp plan` wrote here, else the one beside the model's files.

    Args:
        plan: A folder with plan.json, one with such a folder `sdfp` in it (as a model's own), or the id of a
            Hugging Face repository like either.
        revision, download_dir: Where the engine finds the files of a `model` that is an id (`resolve_model_dir`).

    Raises:
        SdfpError: If there is no such model, or no plan (PlanError), or it is damaged or made for another model.
    """
    model_dir = resolve_model_dir(model, revision, download_dir)
    target = fingerprint(model_dir)
    beside = model_dir / BESIDE
    if plan is not None:
        same = (beside / PLAN_FILE).is_file() and is_same_model(str(plan), model)
        folder = beside if same else _named(Path(plan), download_dir)
    else:
        folder = _own(target, beside)
        if not (folder / PLAN_FILE).is_file():
            raise PlanError(
                f"model {model!r}",
                f"has no plan yet (looked for {folder} and {beside})",
                f"Make one with `{plan_command(model, model, revision, download_dir)}`, or name a plan folder.",
            )
    return load_parcel(folder, target, plan_command(model, "MODEL", revision, download_dir))


def _own(target: Fingerprint, beside: Path) -> Path:
    """The default place if a plan is there, else the folder beside the model if one is, which needs no home folder."""
    travels = (beside / PLAN_FILE).is_file()
    try:
        folder = default_plan_dir(target)
    except SdfpError:
        if travels:
            return beside
        raise
    return beside if travels and not (folder / PLAN_FILE).is_file() else folder


def _named(plan: Path, download_dir: str | None) -> Path:
    """The folder of the plan that a user named."""
    if plan.exists() or not _ID.fullmatch(str(plan)) or plan.name == PLAN_FILE:
        inside = plan / BESIDE
        return inside if not (plan / PLAN_FILE).is_file() and (inside / PLAN_FILE).is_file() else plan
    return fetch_plan_files(str(plan), download_dir, (PLAN_FILE, BRIDGE_FILE, HEAD_FILE))


def plan_command(model: str, name: str, revision: str | None, download_dir: str | None) -> str:
    """The command that plans for the files that `model` leads to, calling it `name`."""
    if Path(model).is_dir():
        return f"sdfp plan {name}"
    cache = f"HF_HUB_CACHE={download_dir} " if download_dir else ""
    asked = asked_revision(revision)
    return f"{cache}sdfp plan {name}" + (f" --revision {asked}" if asked else "")
