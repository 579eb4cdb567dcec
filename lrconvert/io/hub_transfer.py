"""Uploads to the Hugging Face Hub and downloads from it, through huggingface_hub and only where they are asked for.

The token is huggingface_hub's own affair (``hf auth login``, HF_TOKEN): it is neither read nor written here, and it is
cut out of any message that repeats it. With HF_HUB_OFFLINE nothing is sent.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from lrconvert.core.errors import HubError, OptionError
from lrconvert.core.version import __version__
from lrconvert.core.wording import either, spelled
from lrconvert.io import hub

Part = Literal["adapter", "base", "config"]
_SECRET = re.compile(r"hf_[A-Za-z0-9]{4,}|(?i:bearer)\s+\S+")
_TOKENIZER = (".model", ".txt", ".tiktoken", ".jinja")
_ADAPTER = (".safetensors", ".json", ".lrc", ".gguf", ".npz", ".md")
_PICKLES = (".bin", ".pt", ".pth")


def check_repository(name: str) -> None:
    """Raise E-OPTION for what names no repository to push to, E-HUB if the hub is switched off."""
    hub_id = hub.parse(name)
    if hub_id is None or hub_id.name != name:
        raise OptionError(f"{name!r:.120} does not name a repository", fix="write org/name, or a name of your own")
    _check_online("nothing is uploaded", f"leave {spelled('push_to_hub', ...)} out")


def _check_online(what: str, instead: str) -> None:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise HubError(f"HF_HUB_OFFLINE is set: {what}", fix=f"unset it, or {instead}")


def by_hand(folder: Path, repository: str) -> str:
    """Return how the files of a folder that stays are uploaded after an error."""
    command = shlex.join(["hf", "upload", repository, str(folder)])
    return f"the files are complete in {folder}; upload them with `{command}`"


def upload(folder: Path, names: Sequence[str], repository: str, private: bool, again: str) -> str:
    """Upload the files `names` of a folder in one commit, to a repository that is made if it is not there, and return
    its address. Other files in it stay. `again` is the advice after an error. Raises E-HUB."""
    from huggingface_hub import CommitOperationAdd, HfApi

    check_repository(repository)
    with _errors(repository, again):
        api = HfApi(library_name="lrconvert", library_version=__version__)
        made = api.create_repo(repository, private=private or None, exist_ok=True)
        added = [CommitOperationAdd(name, str(folder / name)) for name in sorted(names)]
        api.create_commit(made.repo_id, added, commit_message=f"Upload an adapter with lrconvert {__version__}")
    return str(made)


def download(
    name: str, part: Part = "adapter", *, pickles: bool = False, report: Callable[[str], None] = lambda line: None
) -> Path:
    """Download what lrconvert reads of a hub id into the local Hugging Face cache, and return its folder there.

    `part`: an "adapter", a "base" with its weights, or its "config" alone. Of an adapter's repository only adapters are
    fetched (`pickles`: those in pickles, too), of a pipeline only configurations. `report` takes a line that says what
    is fetched. Raises E-OPTION for what is no hub id, E-HUB, and what `hub.locate` raises.
    """
    hub_id = hub.parse(name)
    if hub_id is None:
        raise OptionError(f"{name!r:.120} is no hub id", fix="write org/name, or org/name@revision")
    _check_online("nothing is downloaded", either("read it from the cache", "leave --download out"))
    from huggingface_hub import HfApi, snapshot_download

    with _errors(name, "is it spelled right, and may you read it (`hf auth login`)?"):
        api = HfApi(library_name="lrconvert", library_version=__version__)
        listed = api.model_info(hub_id.name, revision=hub_id.revision, files_metadata=True).siblings or []
        sizes = {file.rfilename: file.size or 0 for file in listed}
        wanted = _wanted(list(sizes), part, pickles)
        if not wanted:
            raise HubError(f"{name}: holds nothing that is read as {_AS[part]}", fix="is it the right repository?")
        total = sum(sizes[file] for file in wanted)
        report(f"downloading {name}: {len(wanted)} files, {total / 1e6:,.1f} MB")
        snapshot_download(hub_id.name, revision=hub_id.revision, allow_patterns=[_literal(file) for file in wanted])
    return hub.locate(name)


def fetch_file(name: str, path: str, revision: str = "main") -> Path | None:
    """Return one file of a repository in the local cache, fetched if it is not there or is another by now; None if the
    repository has none at that path. With HF_HUB_OFFLINE only the cache is looked at. Raises E-HUB."""
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    with _errors(name, "is it spelled right, and may you read it (`hf auth login`)?"):
        try:
            return Path(hf_hub_download(name, path, revision=revision, library_name="lrconvert"))
        except LocalEntryNotFoundError:
            if constants.HF_HUB_OFFLINE:
                return None
            raise
        except EntryNotFoundError:
            return None


_AS = {"adapter": "an adapter", "base": "a base (weights in safetensors)", "config": "a base's configuration"}


def _wanted(names: Collection[str], part: Part, pickles: bool) -> list[str]:
    """The files of a repository that are read; none of a model, however large, where an adapter is asked for."""
    is_model = not {"config.json", "model_index.json"}.isdisjoint(names) and "adapter_config.json" not in names
    if part == "adapter" and is_model:
        return []
    if "model_index.json" in names:  # a pipeline: names of modules are all that is asked of it
        return [name for name in names if name == "model_index.json" or re.fullmatch(r"[^/]+/config\.json", name)]
    if part == "config":
        return [name for name in names if name == "config.json"]
    flat = [name for name in names if "/" not in name]
    if part == "adapter":
        if not any(name.endswith((*_ADAPTER[:1], *_ADAPTER[2:5], *_PICKLES)) for name in flat):
            flat = list(names)  # PEFT's adapters of another name lie in a folder of it
        return [name for name in flat if name.endswith((*_ADAPTER, *(_PICKLES if pickles else ())))]
    whole = [name for name in flat if name.startswith("model") and name.endswith(".safetensors")]
    weights = whole or [name for name in flat if name.endswith(".safetensors")]
    return [name for name in flat if name.endswith((".json", *_TOKENIZER)) or name in weights] if weights else []


def _literal(name: str) -> str:
    """A pattern that means this name alone."""
    return re.sub(r"([*?\[])", r"[\1]", name)


@contextmanager
def _errors(name: str, fix: str) -> Iterator[None]:
    """Turn what huggingface_hub and the network raise into E-HUB."""
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        yield
    except HubError:
        raise
    except GatedRepoError:
        what = "is gated, and you have no access to it"
        raise HubError(f"{name}: {what}", fix="ask for access on its page, then `hf auth login`") from None
    except RevisionNotFoundError:
        raise HubError(f"{name}: the hub has no such revision", fix="see the branches on its page") from None
    except RepositoryNotFoundError:
        raise HubError(f"{name}: the hub has no such model, or not for you", fix=fix) from None
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", "?")
        said = getattr(error, "server_message", None) or str(error)
        fix = "log in with `hf auth login` and a token that may write" if status in (401, 403) else fix
        raise HubError(f"{name}: the hub answers {status}: {_plain(said)}", fix=fix) from None
    except (OSError, ValueError, RuntimeError) as error:  # no network, no token, what was received is not what was sent
        raise HubError(f"{name}: {type(error).__name__}: {_plain(str(error))}", fix=fix) from None
    except Exception as error:
        if type(error).__module__.partition(".")[0] not in (
            "httpx",
            "httpx2",
            "httpcore",
            "httpcore2",
            "requests",
            "huggingface_hub",
        ):
            raise
        raise HubError(f"{name}: the hub cannot be reached: {_plain(str(error))}", fix=fix) from None


def _plain(text: str) -> str:
    """The first line of a message, without secrets."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return _SECRET.sub("(cut)", lines[0] if lines else "no reason given")[:300]
