"""Whether a Ray cluster turns us away for want of its token. Ray only says, after 20 s, that it can't connect."""

from __future__ import annotations

import os
from pathlib import Path

import grpc

_ANY_CALL = "/ray.rpc.NodeInfoGcsService/GetClusterId"
_ANSWER_S = 5.0

HOW_TO_GIVE_IT = (
    "Put the cluster's token into ~/.ray/auth_token or RAY_AUTH_TOKEN, and set RAY_AUTH_MODE=token: without it "
    "Ray sends none. A job that `ray job submit` starts has it by itself."
)


def is_refused(address: str) -> bool:
    """Whether the Ray at `address` (host:port) answers, and wants another token than ours or none at all."""
    token = _own_token()
    metadata = () if token is None else (("authorization", f"Bearer {token}"),)
    with grpc.insecure_channel(address) as channel:
        try:
            channel.unary_unary(_ANY_CALL)(b"", metadata=metadata, timeout=_ANSWER_S)
        except grpc.RpcError as error:
            return error.code() == grpc.StatusCode.UNAUTHENTICATED
    return False


def _own_token() -> str | None:
    """The token that Ray would send: looked for as Ray does it."""
    if os.environ.get("RAY_AUTH_MODE", "").lower() != "token":
        return None
    if token := os.environ.get("RAY_AUTH_TOKEN"):
        return token.strip()
    file = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()
    return file.read_text(encoding="utf-8").strip() if file.is_file() else None
