"""A Kubernetes API server of the tests' own: etcd and kube-apiserver as processes, RBAC on, our CRDs in it."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

BINARIES = ("etcd", "kube-apiserver", "kubectl")
ADMIN_TOKEN = "admin-of-the-tests"
START_SECONDS = 180
HOW_TO_GET_THEM = (
    "The operator's API server tests need etcd, kube-apiserver and kubectl in one folder, named by KUBEBUILDER_ASSETS. "
    "Get them by `export KUBEBUILDER_ASSETS=$(setup-envtest use -p path)`, "
    "where setup-envtest is controller-runtime's tool of that name (Go)"
)


def assets() -> Path | None:
    """The folder with the three binaries, or None."""
    folder = os.environ.get("KUBEBUILDER_ASSETS")
    if folder and all(os.access(Path(folder) / name, os.X_OK) for name in BINARIES):
        return Path(folder)
    return None


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say it loudly, whatever else the run prints: a skipped tier must not look like a green one."""
    skipped = [
        report for report in terminalreporter.stats.get("skipped", []) if HOW_TO_GET_THEM in str(report.longrepr)
    ]
    if skipped:
        terminalreporter.section("NO KUBERNETES API SERVER: tests of the operator were skipped", sep="!", red=True)
        terminalreporter.line(f"{len(skipped)} tests did not run. {HOW_TO_GET_THEM}.")


@dataclass
class ApiServer:
    """One etcd and one kube-apiserver on free ports, in a folder of their own.

    Both can be stopped and started again on the same ports and data. `kubeconfig` is an administrator's.
    """

    folder: Path
    assets: Path
    etcd_port: int = 0
    etcd_peer_port: int = 0
    port: int = 0
    flags: tuple[str, ...] = ()
    _processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    _clients: list[httpx.Client] = field(default_factory=list)

    # --- life ---

    def __post_init__(self) -> None:
        self.etcd_port, self.etcd_peer_port, self.port = free_ports(3)
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "tokens.csv").write_text(f'{ADMIN_TOKEN},admin,admin,"system:masters"\n')
        key = self.folder / "service-accounts.key"
        subprocess.run(["openssl", "genrsa", "-out", str(key), "2048"], check=True, capture_output=True)
        self.kubeconfig.write_text(yaml.safe_dump(self.kubeconfig_of(ADMIN_TOKEN)))

    def start(self) -> "ApiServer":
        self.start_etcd()
        self.start_apiserver()
        return self

    def start_etcd(self) -> None:
        url, peer = f"http://127.0.0.1:{self.etcd_port}", f"http://127.0.0.1:{self.etcd_peer_port}"
        self._spawn(
            "etcd",
            f"--data-dir={self.folder / 'etcd'}",
            f"--listen-client-urls={url}",
            f"--advertise-client-urls={url}",
            f"--listen-peer-urls={peer}",
            f"--initial-advertise-peer-urls={peer}",
            f"--initial-cluster=default={peer}",
            "--unsafe-no-fsync",
            "--log-level=warn",
        )

    def start_apiserver(self) -> None:
        key = self.folder / "service-accounts.key"
        self._spawn(
            "kube-apiserver",
            f"--etcd-servers=http://127.0.0.1:{self.etcd_port}",
            "--bind-address=127.0.0.1",
            "--advertise-address=127.0.0.1",
            f"--secure-port={self.port}",
            f"--cert-dir={self.folder / 'certificates'}",
            f"--token-auth-file={self.folder / 'tokens.csv'}",
            "--authorization-mode=RBAC",
            f"--service-account-key-file={key}",
            f"--service-account-signing-key-file={key}",
            "--service-account-issuer=https://kubernetes.default.svc",
            "--service-cluster-ip-range=10.0.0.0/16",
            "--disable-admission-plugins=ServiceAccount",
            "--allow-privileged=true",
            *self.flags,
        )
        self.wait_ready()

    def wait_ready(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not self.is_ready():
            for name, process in self._processes.items():
                assert process.poll() is None, f"{name} ended:\n{self.log(name)[-3000:]}"
            assert time.monotonic() < deadline, f"not ready:\n{self.log('kube-apiserver')[-3000:]}"
            time.sleep(0.1)

    def is_ready(self) -> bool:
        with contextlib.suppress(httpx.HTTPError, OSError):
            certificate = self.certificate
            if certificate.exists():
                with self.client() as client:
                    return client.get("/readyz", timeout=5).status_code == 200
        return False

    def stop_apiserver(self, how: signal.Signals = signal.SIGTERM) -> None:
        self._end("kube-apiserver", how)

    def stop(self) -> None:
        self._end("kube-apiserver", signal.SIGTERM)
        self._end("etcd", signal.SIGTERM)

    def _spawn(self, name: str, *flags: str) -> None:
        with (self.folder / f"{name}.log").open("ab") as log:
            self._processes[name] = subprocess.Popen(
                [str(self.assets / name), *flags], stdout=log, stderr=log, cwd=self.folder
            )

    def _end(self, name: str, how: signal.Signals) -> None:
        process = self._processes.pop(name, None)
        if process is None or process.poll() is not None:
            return
        process.send_signal(how)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def pid(self, name: str = "kube-apiserver") -> int:
        return self._processes[name].pid

    def log(self, name: str = "kube-apiserver") -> str:
        return (self.folder / f"{name}.log").read_text(errors="replace")

    # --- addresses ---

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.port}"

    @property
    def token(self) -> str:
        return ADMIN_TOKEN

    @property
    def certificate(self) -> Path:
        """Self-signed, so it is its own authority."""
        return self.folder / "certificates" / "apiserver.crt"

    @property
    def kubeconfig(self) -> Path:
        return self.folder / "kubeconfig.yaml"

    def kubeconfig_of(self, token: str, namespace: str = "default", url: str | None = None) -> dict[str, Any]:
        """For another user, a namespace, or through a proxy at another URL on 127.0.0.1."""
        cluster = {"server": url or self.url, "certificate-authority": str(self.certificate)}
        context = {"cluster": "tests", "user": "tests", "namespace": namespace}
        return {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "tests", "cluster": cluster}],
            "users": [{"name": "tests", "user": {"token": token}}],
            "contexts": [{"name": "tests", "context": context}],
            "current-context": "tests",
        }

    # --- use ---

    def client(self, token: str | None = None) -> httpx.Client:
        """HTTP to the API server. With `merge`, `apply` and the like left to the test: it is plain JSON."""
        import ssl

        return httpx.Client(
            base_url=self.url,
            verify=ssl.create_default_context(cafile=str(self.certificate)),
            headers={"Authorization": f"Bearer {token or ADMIN_TOKEN}"},
            timeout=60,
            trust_env=False,
        )

    def kubectl(self, *args: str, stdin: str | None = None, check: bool = True) -> subprocess.CompletedProcess[str]:
        result = subprocess.run(
            [str(self.assets / "kubectl"), f"--kubeconfig={self.kubeconfig}", *args],
            input=stdin,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            env=os.environ | {"HOME": str(self.folder)},  # its discovery cache
        )
        assert not check or result.returncode == 0, f"kubectl {' '.join(args)}: {result.stderr}{result.stdout}"
        return result

    def apply(self, *manifests: dict[str, Any]) -> None:
        """Server-side apply, as administrator."""
        text = json.dumps({"apiVersion": "v1", "kind": "List", "items": list(manifests)})
        self.kubectl("apply", "--server-side", "--force-conflicts", "-f", "-", stdin=text)

    def install(self, crds: list[dict[str, Any]]) -> None:
        """Install CRDs and wait until objects of theirs can be listed."""
        self.apply(*crds)
        deadline = time.monotonic() + START_SECONDS
        with self.client() as client:
            for crd in crds:
                spec = crd["spec"]
                version = next(each["name"] for each in spec["versions"] if each["served"])
                path = f"/apis/{spec['group']}/{version}/{spec['names']['plural']}"
                while (response := client.get(path, params={"limit": 1})).status_code != 200:
                    assert time.monotonic() < deadline, f"{path}: {response.text}"
                    time.sleep(0.1)

    @contextlib.contextmanager
    def namespace(self) -> Iterator[str]:
        """A namespace of a test's own. Without controllers it is never emptied, so it is left behind."""
        name = f"t-{uuid.uuid4().hex[:10]}"
        with self.client() as client:
            client.post("/api/v1/namespaces", json={"metadata": {"name": name}}).raise_for_status()
        yield name


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, all different."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def kserve_crds() -> list[dict[str, Any]]:
    """KServe's CRDs out of KSERVE_CRDS: a folder of YAML, or the templates of its chart `kserve-crd`."""
    folder = os.environ.get("KSERVE_CRDS")
    if not folder:
        return []
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # two megabytes
    documents: list[dict[str, Any]] = []
    for path in sorted(Path(folder).glob("*.y*ml")):
        text = path.read_text(encoding="utf-8")
        if "{{" in text:  # a template that includes a file of the same name
            text = (path.parent.parent / "files" / path.name).read_text(encoding="utf-8")
        documents += [each for each in yaml.load_all(text, Loader=loader) if each]
    return [each for each in documents if each["kind"] == "CustomResourceDefinition"]


@pytest.fixture(scope="session")
def new_apiserver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., ApiServer]]:
    """Makes API servers with nothing in them, for tests that stop, starve or flag them; all end with the session."""
    folder = assets()
    if folder is None:
        assert not os.environ.get("REQUIRE_TOOLS"), HOW_TO_GET_THEM
        pytest.skip(HOW_TO_GET_THEM)
    assert shutil.which("openssl"), "openssl makes the key of service accounts"
    servers: list[ApiServer] = []

    def make(*flags: str) -> ApiServer:
        server = ApiServer(tmp_path_factory.mktemp("apiserver"), folder, flags=flags)
        servers.append(server)
        return server.start()

    yield make
    for server in servers:
        server.stop()


@pytest.fixture(scope="session")
def apiserver(new_apiserver: Callable[..., ApiServer]) -> ApiServer:
    """The API server of the session, with our CRDs, and KServe's when KSERVE_CRDS names their folder."""
    from sightline_operator.api import crds

    server = new_apiserver()
    server.install([*crds(), *kserve_crds()])
    return server


@pytest.fixture(scope="session")
def controlled(new_apiserver: Callable[..., ApiServer]) -> Iterator[ApiServer]:
    """One with our CRDs and kube-controller-manager: Jobs, Deployments, owner references and namespaces move."""
    from sightline_operator.api import crds
    from tests.operator.controllers import controller_manager

    folder = assets()
    if folder is None or not os.access(folder / "kube-controller-manager", os.X_OK):
        pytest.skip(
            "kube-controller-manager, as KUBEBUILDER_ASSETS of setup-envtest does not hold it, must be put there"
        )
    server = new_apiserver()
    server.install(crds())
    with controller_manager(server):
        yield server


@pytest.fixture
def namespace(apiserver: ApiServer) -> Iterator[str]:
    with apiserver.namespace() as name:
        yield name
