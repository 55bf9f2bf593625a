"""Asks the Hugging Face Hub whether it has what a config names, before anything is downloaded or started."""

from pathlib import Path
from typing import Literal

from raytune_ds.errors import UserError, first_line

TIMEOUT_S = 10.0


def check_dataset(name: str) -> str:
    """Asks for a dataset; returns the commit it stands at.

    Raises:
        UserError: the Hub has no such dataset, does not give it to this user, or does not answer.
    """
    return _check("dataset", name)


def check_model(name: str) -> None:
    """Asks for a model; the local cache is not looked at.

    Raises:
        UserError: the Hub has no such model, does not give it to this user, or does not answer.
    """
    _check("model", name)


def commit_of(model: str) -> str | None:
    """The commit of the model whose config.json was last fetched here; None where its cache has none."""
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(model, "config.json")
    return Path(config).parent.name if isinstance(config, str) else None


def _check(kind: Literal["dataset", "model"], name: str) -> str:
    """One request without a retry; the loaders try for half a minute and more before they give up."""
    from huggingface_hub import HfApi, errors

    api = HfApi()
    ask = api.dataset_info if kind == "dataset" else api.model_info
    try:
        return str(ask(name, timeout=TIMEOUT_S).sha)
    except errors.GatedRepoError as error:
        page = f"{api.endpoint}/datasets/{name}" if kind == "dataset" else f"{api.endpoint}/{name}"
        raise UserError(
            f"the {kind} '{name}' is gated: accept its terms at {page} and set HF_TOKEN"
        ) from error
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise UserError(
            f"there is no {kind} '{name}', or it is private: check the name, or set HF_TOKEN"
        ) from error
    except errors.OfflineModeIsEnabled as error:
        raise UserError(f"the Hub is not asked for the {kind} '{name}': HF_HUB_OFFLINE is set") from error
    except errors.HfHubHTTPError as error:
        raise UserError(f"the Hub did not serve the {kind} '{name}': {first_line(error)}") from error
    except Exception as error:  # its HTTP library's own, which changes with its version
        raise UserError(
            f"the Hub can't be reached for the {kind} '{name}' ({first_line(error)}): check the network, or"
            " copy the files here and name their path"
        ) from error
