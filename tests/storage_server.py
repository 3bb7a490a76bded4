"""An emulator of Cloud Storage on loopback: ``python storage_server.py PORT BUCKET``.

The package gcp-storage-emulator, and what TensorStore relies on and it lacks: objects are sent with
their generation, and uploads and reads may depend on it (ifGenerationMatch, ifGenerationNotMatch).
"""

from __future__ import annotations

import sys
import threading
from http import HTTPStatus
from typing import Any

from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers import objects


def generation(storage: Any, bucket: str, name: str) -> str:
    """That of an object; 0 if there is none."""
    try:
        return str(storage.get_file_obj(bucket, name)["generation"])
    except NotFound:
        return "0"


def conditional(handler: Any, name_of: Any, otherwise: HTTPStatus) -> Any:
    """The handler, if the object's generation is as the request asks."""

    def handle(request: Any, response: Any, storage: Any, *args: Any, **kwargs: Any) -> Any:
        now = generation(storage, request.params["bucket_name"], name_of(request))
        match, other = (
            request.query.get(key, [None])[0]
            for key in ("ifGenerationMatch", "ifGenerationNotMatch")
        )
        if (match is not None and match != now) or (other is not None and other == now):
            response.status = otherwise if match is None else HTTPStatus.PRECONDITION_FAILED
            return None
        response["X-Goog-Generation"] = now
        return handler(request, response, storage, *args, **kwargs)

    return handle


def object_id(request: Any) -> str:
    return request.params["object_id"]


# Before the server's table of routes takes them.
objects.get = conditional(objects.get, object_id, HTTPStatus.NOT_MODIFIED)
objects.insert = conditional(
    objects.insert,
    lambda request: request.query.get("name", [""])[0],
    HTTPStatus.PRECONDITION_FAILED,
)

from gcp_storage_emulator.server import create_server  # noqa: E402

if __name__ == "__main__":
    server = create_server("127.0.0.1", int(sys.argv[1]), True, default_bucket=sys.argv[2])
    server.start()
    threading.Event().wait()
