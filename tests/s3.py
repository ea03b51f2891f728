"""A real S3 server for tests: versitygw or minio when one is on PATH, else moto in this process.

    with running_s3(folder) as s3:
        uri = s3.put("bucket", "a key.png", data)       # s3://bucket/a key.png
        subprocess.run(…, env=os.environ | s3.environment())
        s3.client.get_object(Bucket="bucket", Key="a key.png")

moto serves the same protocol but checks no keys: skip a test of credentials unless `s3.is_real`.
"""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

Kind = Literal["versitygw", "minio", "moto"]

START_SECONDS = 30
ACCESS_KEY, SECRET_KEY, REGION = "sightline-test", "sightline-test-secret", "us-east-1"


@dataclass
class S3Server:
    """One running server and the keys that open it."""

    kind: Kind
    endpoint_url: str
    access_key: str = ACCESS_KEY
    secret_key: str = SECRET_KEY
    region: str = REGION
    _buckets: set[str] = field(default_factory=set, repr=False)

    @property
    def is_real(self) -> bool:
        """Whether it checks keys and signatures."""
        return self.kind != "moto"

    @cached_property
    def client(self) -> Any:
        """A boto3 client, for arranging and for looking behind the scenes."""
        import boto3.session
        from botocore.config import Config

        return boto3.session.Session().client(
            "s3",
            endpoint_url=self.endpoint_url,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            region_name=self.region,
            config=Config(s3={"addressing_style": "path"}, connect_timeout=5, read_timeout=30, proxies={}),
        )

    def bucket(self, name: str) -> str:
        """Make a bucket unless it is there; returns its name."""
        if name not in self._buckets:
            with suppress(self.client.exceptions.BucketAlreadyOwnedByYou, self.client.exceptions.BucketAlreadyExists):
                self.client.create_bucket(Bucket=name)
            self._buckets.add(name)
        return name

    def put(self, bucket: str, key: str, data: bytes) -> str:
        """Store an object, making the bucket first where needed; returns its `s3://` URI."""
        self.client.put_object(Bucket=self.bucket(bucket), Key=key, Body=data)
        return f"s3://{bucket}/{key}"

    def environment(self) -> dict[str, str]:
        """What a process, ours or any with an AWS SDK, needs in its environment to use this server."""
        return {
            "AWS_ENDPOINT_URL_S3": self.endpoint_url,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_REGION": self.region,
            "AWS_EC2_METADATA_DISABLED": "true",
        }


def available() -> Kind:
    """The server that `running_s3` would choose."""
    if shutil.which("versitygw"):
        return "versitygw"
    return "minio" if shutil.which("minio") else "moto"


@contextmanager
def running_s3(folder: Path, kind: Kind | None = None) -> Iterator[S3Server]:
    """Run an S3 server on a free port of the loopback, with its objects in `folder`, until the block ends."""
    kind = kind or available()
    context = _moto() if kind == "moto" else _process(kind, folder)
    with context as server:
        try:
            yield server
        finally:
            server.client.close()


@contextmanager
def _moto() -> Iterator[S3Server]:
    from moto.server import ThreadedMotoServer

    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    try:
        host, port = moto.get_host_and_port()
        yield S3Server("moto", f"http://{host}:{port}")
    finally:
        moto.stop()


@contextmanager
def _process(kind: Kind, folder: Path) -> Iterator[S3Server]:
    data, log_path = folder / "objects", folder / f"{kind}.log"
    data.mkdir(parents=True, exist_ok=True)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    command: list[str]
    keys: Mapping[str, str]
    if kind == "versitygw":
        command = ["versitygw", "--port", f"127.0.0.1:{port}", "--region", REGION, "posix", str(data)]
        keys = {"ROOT_ACCESS_KEY": ACCESS_KEY, "ROOT_SECRET_KEY": SECRET_KEY}
    else:
        command = ["minio", "server", "--quiet", "--address", f"127.0.0.1:{port}", str(data)]
        keys = {"MINIO_ROOT_USER": ACCESS_KEY, "MINIO_ROOT_PASSWORD": SECRET_KEY}
    with log_path.open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | keys)
    try:
        _wait(process, port, log_path)
        yield S3Server(kind, f"http://127.0.0.1:{port}")
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait(process: "subprocess.Popen[bytes]", port: int, log_path: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        said = log_path.read_text(errors="replace")[-2000:]
        assert process.poll() is None, f"the S3 server ended:\n{said}"
        assert time.monotonic() < deadline, f"the S3 server did not start:\n{said}"
        time.sleep(0.05)
