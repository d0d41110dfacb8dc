"""Names on the Hugging Face hub: what is on this machine comes first."""

import re
from pathlib import Path
from typing import Final

from fewstep.types import FewstepError

HUB_NAME: Final = re.compile(r"\w[\w.-]*/\w[\w.-]*")  # OWNER/NAME
WANTED: Final = ["*.json", "*.safetensors"]


def resolve(source: str | Path) -> Path:
    """A path here as it is; OWNER/NAME as the folder of its copy in the hub's cache, downloaded if need be.

    FewstepError when there is neither, or no network to get it by.
    """
    path = Path(source).expanduser()
    ours = path.exists() or path.suffix in (".safetensors", ".pkl", ".pt", ".pth") or path.parent.is_dir()
    if ours or not HUB_NAME.fullmatch(str(source)):
        return path  # a name whose first part is a folder here is a mistyped path, not somebody's repository
    return from_hub(str(source))


def from_hub(name: str) -> Path:
    """The folder of a hub model's configuration and weights: safetensors, or archives where it has nothing else."""
    from huggingface_hub import list_repo_files, snapshot_download

    try:
        folder = Path(snapshot_download(name, allow_patterns=[*WANTED, "*.bin"], local_files_only=True))
        if not whole(folder):
            raise FileNotFoundError("only a part of it is in the cache")
        return folder
    except Exception:  # half a dozen kinds for what is not in the cache
        try:
            safe = any(file.endswith(".safetensors") for file in list_repo_files(name))
            return Path(snapshot_download(name, allow_patterns=WANTED if safe else [*WANTED, "*.bin"]))
        except Exception as error:
            said = " ".join(str(error).split())[:200] or type(error).__name__
            raise FewstepError(
                f"{name} is not on this machine, and the hub did not give it ({said}): where there is a network run "
                f"`hf download {name}` and copy ~/.cache/huggingface here; or give a folder or file"
            ) from error


def whole(folder: Path) -> bool:
    """Whether a folder of the cache has a description and the weights of a network."""
    described = any((folder / name).is_file() for name in ("model_index.json", "config.json"))
    places = [folder / part for part in ("", "unet", "transformer")]
    return described and any(file.suffix in (".safetensors", ".bin") for place in places for file in place.glob("*"))
