"""An exported directory to the Hugging Face hub."""

from __future__ import annotations

import os
from pathlib import Path

from raytune_ds.errors import UserError, first_line

_TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")


def token_for(repo: str) -> str:
    """The token to push with, from the environment.

    Args:
        repo: where to, ORG/NAME.

    Raises:
        UserError: there is none, or that is no name of a repository.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UserError(f"--push {repo}: is no name of a repository: {first_line(error)}") from error
    if repo.count("/") != 1:
        raise UserError(f"--push {repo}: say whose it is, as in my-org/{repo}.")
    token = next((value for name in _TOKENS if (value := os.environ.get(name))), None)
    if token is None:
        raise UserError(
            f"--push {repo}: needs a token that may write there, in the environment variable {_TOKENS[0]}."
        )
    return token


def push(folder: Path, repo: str, token: str, private: bool) -> str:
    """Uploads a directory; the repository is made if there is none.

    Args:
        folder: all of its files are uploaded.
        repo: ORG/NAME.
        token: see `token_for`.
        private: of a repository that is made.

    Returns:
        The page of the model.

    Raises:
        UserError: the hub refuses, or can't be reached; what was exported stays.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    try:
        made = api.create_repo(repo, repo_type="model", private=private, exist_ok=True)
        api.upload_folder(
            repo_id=made.repo_id, folder_path=folder, repo_type="model", commit_message="Export of raytune_ds"
        )
    except Exception as error:  # the hub's, and its HTTP library's own, which change with their versions
        raise UserError(
            f"--push {repo}: {first_line(error)}\nThe export is in {folder}; this uploads it again: "
            f"hf upload {repo} {folder}"
        ) from error
    return str(made)
