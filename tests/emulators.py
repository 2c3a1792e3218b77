"""Serve object stores over HTTP on this machine: Google's with gcp-storage-emulator, S3 with moto.

TensorStore's driver needs two things that gcp-storage-emulator lacks. This module adds them: the header
`x-goog-generation` of a download, and the preconditions `ifGenerationMatch` and `ifGenerationNotMatch`.
"""

import contextlib
import functools
import http
import http.server
import threading
from collections.abc import Iterator

BUCKET = "bucket"


@functools.cache
def google() -> dict[str, str]:
  """Return the environment that leads clients to an emulator with the bucket BUCKET.

  A process has one, until it ends: gcsfs keeps the address of the first.
  """
  from gcp_storage_emulator import server as emulator

  emulator.HANDLERS = tuple(
    (pattern, {method: _with_generations(handler) for method, handler in handlers.items()})
    for pattern, handlers in emulator.HANDLERS
  )
  emulated = emulator.create_server("127.0.0.1", 0, in_memory=True, default_bucket=BUCKET)
  handler = lambda *args: emulator.RequestHandler(emulated._storage, *args)
  httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
  httpd.handle_error = lambda *_: None  # a client that is killed breaks its connections
  threading.Thread(target=httpd.serve_forever, daemon=True).start()
  return {"STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{httpd.server_port}"}


@contextlib.contextmanager
def s3() -> Iterator[dict[str, str]]:
  """Start an emulator with the empty bucket BUCKET. Yield the environment that leads clients to it."""
  import boto3
  from moto.server import ThreadedMotoServer

  server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
  server.start()
  host, port = server.get_host_and_port()
  environment = {
    "AWS_ENDPOINT_URL": f"http://{host}:{port}",
    "AWS_ACCESS_KEY_ID": "anyone",
    "AWS_SECRET_ACCESS_KEY": "anything",
    "AWS_DEFAULT_REGION": "us-east-1",
  }
  boto3.client(
    "s3",
    endpoint_url=environment["AWS_ENDPOINT_URL"],
    region_name="us-east-1",
    aws_access_key_id="anyone",
    aws_secret_access_key="anything",
  ).create_bucket(Bucket=BUCKET)
  yield environment
  server.stop()


_lock = threading.Lock()


def _with_generations(handler):
  def handle(request, response, storage):
    params, query = request.params or {}, request.query
    bucket, name = params.get("bucket_name"), params.get("object_id") or query.get("name", [None])[0]
    if query.get("uploadType") == ["multipart"]:
      name = name or request.data["meta"]["name"]

    def generation() -> str:
      try:
        return storage.get_file_obj(bucket, name)["generation"]
      except Exception:  # the emulator's NotFound, or a request for no object
        return "0"

    with _lock:
      if query.get("ifGenerationMatch", [generation()])[0] != generation():
        request.data  # noqa: B018  the body has to be read
        response.status = http.HTTPStatus.PRECONDITION_FAILED
      elif query.get("ifGenerationNotMatch", [None])[0] == generation():
        response.status = http.HTTPStatus.NOT_MODIFIED
      else:
        handler(request, response, storage)
        if query.get("alt") == ["media"] and generation() != "0":
          response["x-goog-generation"] = generation()

  return handle
