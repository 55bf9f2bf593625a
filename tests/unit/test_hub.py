"""What the Hub's answers become."""

from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import errors

from raytune_ds import hub
from raytune_ds.errors import UserError


def answer_with(monkeypatch: pytest.MonkeyPatch, error: Exception | None) -> list[str]:
    """Returns the requests, which are added as they come."""
    asked: list[str] = []
    for method in ("dataset_info", "model_info"):

        def answer(self: Any, name: str, timeout: float, method: str = method) -> SimpleNamespace:
            assert timeout <= 10
            asked.append(f"{method} {name}")
            if error is not None:
                raise error
            return SimpleNamespace(sha="c0ffee")

        monkeypatch.setattr(huggingface_hub.HfApi, method, answer)
    return asked


def http_error(kind: str) -> Exception:
    of_kind = getattr(errors, kind)
    error = of_kind.__new__(of_kind)  # their constructors ask for a response
    error.args = ("the server said 401.\nand more",)
    return error


def test_one_request(monkeypatch):
    asked = answer_with(monkeypatch, None)
    assert hub.check_dataset("org/data") == "c0ffee"
    hub.check_model("org/model")
    assert asked == ["dataset_info org/data", "model_info org/model"]


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ConnectionError("Name or service not known"), ["can't be reached", "Name or service", "network"]),
        (TimeoutError(), ["can't be reached", "(TimeoutError)"]),
        (http_error("RepositoryNotFoundError"), ["there is no", "private", "HF_TOKEN"]),
        (http_error("GatedRepoError"), ["gated", "accept its terms"]),
        (http_error("OfflineModeIsEnabled"), ["HF_HUB_OFFLINE"]),
        (http_error("HfHubHTTPError"), ["did not serve", "said 401"]),
    ],
)
def test_refusals(error, words, monkeypatch):
    answer_with(monkeypatch, error)
    for check, kind in ((hub.check_dataset, "dataset"), (hub.check_model, "model")):
        with pytest.raises(UserError, match=f"{kind} 'org/name'") as caught:
            check("org/name")
        told = str(caught.value)
        assert [word for word in words if word not in told] == [], told
        assert "\n" not in told


def test_the_page_of_a_gated_one(monkeypatch):
    answer_with(monkeypatch, http_error("GatedRepoError"))
    with pytest.raises(UserError, match=r"https://[\w.]+/datasets/org/name "):
        hub.check_dataset("org/name")
    with pytest.raises(UserError, match=r"https://[\w.]+/org/name "):
        hub.check_model("org/name")
