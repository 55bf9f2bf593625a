"""Whether the Hugging Face hub has a data set or a model of some name: one request, a short wait, a clear reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from raytune_ds.errors import UserError

TIMEOUT_S = 10.0


def check_dataset(name: str) -> None:
    """Raises UserError where the hub knows no such data set, or does not answer within seconds."""
    from huggingface_hub import HfApi

    _check(HfApi().dataset_info, name, page=f"https://huggingface.co/datasets/{name}")


def check_model(name: str) -> None:
    """Raises UserError where the hub knows no such model, or does not answer within seconds."""
    from huggingface_hub import HfApi

    _check(HfApi().model_info, name, page=f"https://huggingface.co/{name}")


def _check(ask: Callable[..., Any], name: str, page: str) -> None:
    from huggingface_hub import errors

    try:
        ask(name, timeout=TIMEOUT_S)
    except errors.GatedRepoError as error:
        raise UserError(f"'{name}' is gated: accept its terms at {page} and set HF_TOKEN") from error
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise UserError(f"there is no '{name}', or it is private: check the name, or set HF_TOKEN") from error
    except errors.OfflineModeIsEnabled as error:
        raise UserError(f"the hub is not asked for '{name}': HF_HUB_OFFLINE is set") from error
    except errors.HfHubHTTPError as error:
        raise UserError(f"the hub did not serve '{name}': {_first_line(error)}") from error
    except Exception as error:  # its HTTP library's own, which changes with its version
        raise UserError(
            f"the hub can't be reached for '{name}' ({type(error).__name__}: {_first_line(error)}): check the network, "
            "or copy it here and name its path"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
