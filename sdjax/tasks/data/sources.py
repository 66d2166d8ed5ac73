"""Which files a name stands for: a file, a folder, or a data set of the Hugging Face hub; of one split and configuration."""

from __future__ import annotations

import fnmatch
import glob
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sdjax.errors import nearest
from sdjax.tasks.data.readers import COMPRESSED, READERS
from sdjax.tasks.errors import TaskError

CARD = "README.md"
ABOUT = re.compile(r"(?:^|/)(?:dataset_infos?|dataset_dict|state|package|config)\.json$")
"""Files of JSON that say something of a data set and are no part of it."""

KINDS = {"training": "train", "valid": "validation", "val": "validation", "dev": "validation"}
KINDS |= {"testing": "test", "eval": "test", "evaluation": "test"}
SPLIT = re.compile(rf"(?:^|[^a-z])(train|test|validation|{'|'.join(KINDS)})(?=[^a-z]|$)")


class Source(NamedTuple):
    """The files of a name, with what was chosen; `revision` is a hub data set's commit."""

    name: str
    files: tuple[Path, ...]
    split: str = ""
    config: str = ""
    revision: str = ""


class Part(NamedTuple):
    """Names of files, and the split and configuration that they are."""

    names: list[str]
    split: str
    config: str


def source(name: str, *, split: str = "", config: str = "", prefer: Sequence[str] = ("train",)) -> Source:
    """The files that `name` stands for.

    `split` and `config` choose among those of a folder or a data set; without them the first of `prefer` that is there,
    or the only one.

    Raises: `TaskError` if there are no such files, or several splits or configurations and none is named.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        part = chosen(readable_names(path), card_of(path), name, split, config, prefer)
        return Source(name, tuple(path / each for each in part.names), part.split, part.config)
    if not path.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", name) and inner_ending(path.name) not in READERS:
        return from_hub(name, split, config, prefer)
    if split or config:
        option = "--split" if split else "--config"
        raise TaskError(f"{name} is one file: {option} is for folders and data sets of the hub.")
    if not path.exists() and not path.suffix and path.name == name:
        raise TaskError(f"{name} does not exist; a data set of the hub is named with its owner, as openai/gsm8k.")
    return Source(name, (path,))


def inner_ending(name: str) -> str:
    """The ending that says how a file is read, without that of its compression."""
    path = Path(name.lower())
    return Path(path.stem).suffix if path.suffix in COMPRESSED else path.suffix


def readable_names(folder: Path) -> list[str]:
    """Names, within a folder, of the files that hold rows; hidden ones and those about the data set are none."""
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(filter(holds_rows, names))


def holds_rows(name: str) -> bool:
    """Whether a file of a folder or data set is one of rows."""
    hidden = any(part.startswith((".", "_")) for part in name.split("/"))
    return not hidden and inner_ending(name) in READERS and not ABOUT.search(name)


def chosen(
    names: Sequence[str], card: Mapping[str, Any], where: str, split: str, config: str, prefer: Sequence[str]
) -> Part:
    """The files of one split and configuration: as the data set's card says, else by their names.  Raises: `TaskError`."""
    if not names:
        raise TaskError(f"{where} holds no files of rows; expected {', '.join(READERS)}, plain or compressed.")
    by_config = configurations(names, card)
    if by_config is None:
        inside = [name for name in names if config in name.split("/")[:-1]] if config else list(names)
        by_config = {config: by_split(inside)} if inside else {}
    configs = card.get("configs")
    default = [c["config_name"] for c in configs if c.get("default")] if isinstance(configs, list) else []
    return picked(by_config, [*default, "default"], where, split, config, prefer)


def picked(
    by_config: Mapping[str, Mapping[str, list[str]]],
    default: Sequence[str],
    where: str,
    split: str,
    config: str,
    prefer: Sequence[str],
) -> Part:
    """One of files by split by configuration: the one that is named, else the only one or a `default`.  Raises: `TaskError`."""
    if not config and len(by_config) > 1:
        config = next((each for each in default if each in by_config), "")
        if not config:
            raise TaskError(f"{where} has the configurations {', '.join(by_config)}; choose one with --config.")
    config = config or next(iter(by_config))
    if config not in by_config:
        have = f"; it has {', '.join(by_config)}" if by_config else ""
        raise TaskError(f"{where} has no configuration {config!r}{nearest(config, list(by_config))}{have}.")
    splits = by_config[config]
    wanted = split if split in splits else KINDS.get(split, split)
    if not split:
        wanted = next((each for each in prefer if each in splits), next(iter(splits)) if len(splits) == 1 else "")
    if wanted not in splits:
        said = f"has no split {split!r}" if split else "has several splits"
        raise TaskError(f"{where} {said}; choose one of {', '.join(splits)} with --split.")
    return Part(splits[wanted], wanted, config)


def configurations(names: Sequence[str], card: Mapping[str, Any]) -> dict[str, dict[str, list[str]]] | None:
    """Files by split by configuration, as the data set's card lists them; `None` where it does not."""
    found: dict[str, dict[str, list[str]]] = {}
    configs = card.get("configs")
    for entry in configs if isinstance(configs, list) else ():
        files = entry.get("data_files") if isinstance(entry, dict) else None
        if files is None or "config_name" not in entry:
            continue
        if isinstance(files, str) or (isinstance(files, list) and all(isinstance(each, str) for each in files)):
            files = [{"split": "train", "path": files}]
        elif isinstance(files, dict):
            files = [{"split": split, "path": path} for split, path in files.items()]
        own = {str(part["split"]): matching(names, part["path"], entry.get("data_dir", "")) for part in files}
        found[str(entry["config_name"])] = {split: some for split, some in own.items() if some}
    return {config: splits for config, splits in found.items() if splits} or None


def matching(names: Sequence[str], patterns: str | Sequence[str], folder: str) -> list[str]:
    """The names that patterns of a card mean."""
    some = [patterns] if isinstance(patterns, str) else patterns
    inside = [f"{folder.strip('/')}/{p}" if folder else p.removeprefix("./") for p in some]
    return [
        n
        for n in names
        if any(fnmatch.fnmatchcase(n, p) or fnmatch.fnmatchcase(n, p.replace("**/", "")) for p in inside)
    ]


def by_split(names: Sequence[str]) -> dict[str, list[str]]:
    """Files by the split that their names say, or else their folders'; those that say none are for training."""
    found: dict[str, list[str]] = {}
    for name in names:
        parts = name.lower().split("/")
        said = [match[1] for part in reversed(parts) for match in [SPLIT.search(part)] if match]
        split = said[0] if said else "train"
        found.setdefault(KINDS.get(split, split), []).append(name)
    return found


def card_of(folder: Path) -> dict[str, Any]:
    """What the head of a folder's README.md says of its files; nothing where there is none."""
    if not (folder / CARD).is_file():
        return {}
    import yaml
    from huggingface_hub import metadata_load

    try:
        return metadata_load(folder / CARD) or {}
    except (OSError, ValueError, yaml.YAMLError):  # the README of something else
        return {}


# ---- the hub --------------------------------------------------------------------------------------------------------


def from_hub(name: str, split: str, config: str, prefer: Sequence[str]) -> Source:
    """The files of a data set of the hub, downloaded, or from the cache where the hub cannot be reached."""
    import httpx
    from huggingface_hub import HfApi, snapshot_download

    get = lambda **how: Path(snapshot_download(name, repo_type="dataset", **how))
    try:
        about = HfApi().dataset_info(name, timeout=20)
        names = sorted(filter(holds_rows, (each.rfilename for each in about.siblings or ())))
        folder = get(revision=about.sha, allow_patterns=[CARD])
        part = chosen(names, card_of(folder), name, split, config, prefer)
        folder = get(revision=about.sha, allow_patterns=[CARD, *map(glob.escape, part.names)])
        return Source(name, tuple(folder / each for each in part.names), part.split, part.config, about.sha or "")
    except (OSError, ValueError, httpx.HTTPError) as error:
        if isinstance(error, TaskError):
            raise
        why = reason(error)
    try:
        folder = get(local_files_only=True)
    except (OSError, ValueError):
        return from_datasets(name, split, config, prefer, why)
    part = chosen(readable_names(folder), card_of(folder), f"{name} (in the cache)", split, config, prefer)
    return Source(name, tuple(folder / each for each in part.names), part.split, part.config, folder.name)


def reason(error: Exception) -> str:
    """Why a data set cannot be had from the hub, and what helps."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    log_in = "log in with `hf auth login` or HF_TOKEN"
    if isinstance(error, GatedRepoError):
        return f"it is gated: ask for access on its page, and {log_in}"
    if isinstance(error, RepositoryNotFoundError):
        return f"there is no such data set, or it is private: check the name, or {log_in}"
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def from_datasets(name: str, split: str, config: str, prefer: Sequence[str], why: str) -> Source:
    """The files of a data set of the hub that the datasets library has loaded before, from its own cache.

    They lie in OWNER___NAME/CONFIG/VERSION/HASH/NAME-SPLIT.arrow, NAME in small letters.  Raises: `TaskError` saying `why`
    the hub did not help where there are none.
    """
    from huggingface_hub import constants

    cache = Path(os.environ.get("HF_DATASETS_CACHE") or Path(constants.HF_HOME) / "datasets")
    plain = lambda text: text.replace("_", "").casefold()
    found: dict[str, Path] = {}
    for file in sorted(cache.glob("*___*/*/*/*/*-*.arrow"), key=lambda file: file.stat().st_mtime):
        owner_and_name, own, *_ = file.relative_to(cache).parts
        whole = not file.name.startswith("cache-") and file.parent.suffix != ".incomplete"
        if whole and plain(owner_and_name) == plain(name.replace("/", "")):
            found[own] = file.parent  # of several versions the newest
    if not found:
        raise TaskError(
            f"{name} is no file or folder, and cannot be had from the Hugging Face hub or its cache ({why})."
        )
    names = lambda folder: sorted(file.name for file in folder.glob("*-*.arrow") if not file.name.startswith("cache-"))
    by_config = {own: by_split(names(folder)) for own, folder in sorted(found.items())}
    part = picked(by_config, ["default"], f"{name} (in the datasets library's cache)", split, config, prefer)
    folder = found[part.config]
    return Source(name, tuple(folder / each for each in part.names), part.split, part.config, folder.name)
