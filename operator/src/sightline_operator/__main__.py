"""The command: `run` the operator, `render` what it would apply, print the `crds` and the `rbac` that it needs."""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import socket
import sys
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sightline_operator.rbac import NAMESPACE, operator_roles, user_roles
from sightline_operator.settings import OperatorSettings, RenderSettings

PREFIX = "SIGHTLINE_OPERATOR_"
NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, do, return the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["render"]:
        from sightline_operator.render.cli import main as render

        return render(arguments[1:], prog="sightline-operator render")
    options = _parser(os.environ).parse_args(arguments)
    if options.command == "crds":
        return _crds(options)
    if options.command == "rbac":
        return _rbac(options)
    return _run(options)


def _crds(options: argparse.Namespace) -> int:
    import yaml

    from sightline_operator.api import crds

    if options.apply:
        return asyncio.run(_apply(crds(), options))
    sys.stdout.write("".join("---\n" + yaml.safe_dump(crd, sort_keys=False, width=120) for crd in crds()))
    return 0


async def _apply(manifests: Sequence[Mapping[str, Any]], options: argparse.Namespace) -> int:
    """What the chart does before an upgrade: Helm never touches a CRD that is there."""
    from sightline_operator.act.client import ApiError, KubernetesClient

    client = await KubernetesClient.connect(options.kubeconfig, options.context)
    try:
        for manifest in manifests:
            await client.apply(manifest)
            sys.stdout.write(f"{manifest['metadata']['name']} applied\n")
    except ApiError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    finally:
        await client.close()
    return 0


def _rbac(options: argparse.Namespace) -> int:
    from sightline_operator.render.cli import as_yaml

    made = user_roles() if options.users else operator_roles(options.namespace, options.own_namespace)
    sys.stdout.write(as_yaml(made))
    return 0


def _run(options: argparse.Namespace) -> int:
    from sightline_operator import logs
    from sightline_operator.process import run

    logs.configure(options.log_level, options.log_format)
    code = asyncio.run(run(_settings(options), options.kubeconfig, options.context))
    sys.stdout.flush()
    # A thread of some library must not keep a process alive that has given its Lease back.
    os._exit(code)


def _settings(options: argparse.Namespace) -> OperatorSettings:
    from sightline_operator.render.cli import environment_of

    images = dict(RenderSettings().images)
    for pair in options.image:
        name, sign, image = pair.partition("=")
        if not sign or not image or name not in images:
            raise SystemExit(f"--image {pair}: must be NAME=IMAGE with NAME one of {', '.join(images)}")
        images[name] = image
    try:
        worker_env = environment_of(options.worker_env)
    except ValueError as error:
        raise SystemExit(f"--worker-env {error}") from error
    render = RenderSettings(
        images=images,
        deployment_mode=options.deployment_mode,
        cluster_domain=options.cluster_domain,
        worker_env=worker_env,
    )
    return OperatorSettings(
        render=render,
        namespaces=tuple(options.namespace),
        lease_namespace=options.lease_namespace,
        lease_name=options.lease_name,
        identity=options.identity,
        metrics_port=options.metrics_port,
        workers=options.workers,
        repair_seconds=options.repair_seconds,
        resync_seconds=options.resync_seconds,
        repair_window_seconds=options.repair_window_seconds,
        gateway_url=options.gateway_url,
        gateway_pod_url=options.gateway_pod_url,
        is_dry_run=options.dry_run,
    )


def _parser(environ: Mapping[str, str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="sightline-operator", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("render", help="print what the operator would apply (see `render --help`)", add_help=False)
    crds = commands.add_parser("crds", help="print the CustomResourceDefinitions, or apply them")
    crds.add_argument("--apply", action="store_true", help="to the cluster, by server-side apply")
    crds.add_argument("--kubeconfig", default=environ.get(f"{PREFIX}KUBECONFIG"), help="instead of $KUBECONFIG")
    crds.add_argument("--context", default=environ.get(f"{PREFIX}CONTEXT"), help="of the kubeconfig")
    rbac = commands.add_parser("rbac", help="print the operator's ServiceAccount, its roles and their bindings")
    rbac.add_argument("-n", "--namespace", action="append", default=[], help="to look at; none: all of them")
    rbac.add_argument("--own-namespace", default=NAMESPACE, help="of the operator's pods and Lease")
    rbac.add_argument("--users", action="store_true", help="instead: roles of people, aggregated into edit and view")
    run = commands.add_parser(
        "run",
        help="run the operator",
        description="Runs wherever a kubeconfig or a service account is.",
        epilog=f"Every option has an environment variable {PREFIX}<OPTION>, as in {PREFIX}METRICS_PORT=9090; "
        "lists are separated by commas. An option wins over its variable.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    _connection_options(run, environ)
    _work_options(run, environ)
    return parser


def _connection_options(run: argparse.ArgumentParser, environ: Mapping[str, str]) -> None:
    def env(name: str, default: str | None = None) -> str | None:
        return environ.get(PREFIX + name, default)

    run.add_argument("--kubeconfig", default=env("KUBECONFIG"), help="instead of $KUBECONFIG or the service account")
    run.add_argument("--context", default=env("CONTEXT"), help="of the kubeconfig")
    run.add_argument(
        "-n", "--namespace", action="append", default=_list(env("NAMESPACE")), help="to look at; none: all of them"
    )
    run.add_argument("--lease-namespace", default=env("LEASE_NAMESPACE", _own_namespace()), help="of the Lease")
    run.add_argument("--lease-name", default=env("LEASE_NAME", OperatorSettings.lease_name), help="of the Lease")
    run.add_argument("--identity", default=env("IDENTITY", _identity(environ)), help="in the Lease and in events")
    run.add_argument(
        "--metrics-port",
        type=int,
        default=env("METRICS_PORT", str(OperatorSettings.metrics_port)),
        help="/metrics, /healthz and /readyz; 0: none",
    )


def _work_options(run: argparse.ArgumentParser, environ: Mapping[str, str]) -> None:
    def env(name: str, default: str) -> str:
        return environ.get(PREFIX + name, default)

    own, render = OperatorSettings(), RenderSettings()
    run.add_argument(
        "--dry-run",
        action="store_true",
        default=env("DRY_RUN", "") in ("1", "true"),
        help="log what would change, by server-side dry runs; write nothing, not even the Lease",
    )
    run.add_argument(
        "--image", action="append", default=_list(env("IMAGE", "")), metavar="NAME=IMAGE", help="as describe=my/image:1"
    )
    run.add_argument(
        "--worker-env",
        action="append",
        default=[pair for pair in re.split(r",(?=[A-Za-z_]\w*=)", env("WORKER_ENV", "")) if pair],
        metavar="NAME=VALUE",
        help="a variable of the workers of batches, such as HTTPS_PROXY=http://proxy:3128",
    )
    run.add_argument(
        "--deployment-mode",
        default=env("DEPLOYMENT_MODE", render.deployment_mode),
        choices=["Standard", "RawDeployment", "Knative", "Serverless"],
        help="of the cluster's KServe",
    )
    run.add_argument("--cluster-domain", default=env("CLUSTER_DOMAIN", render.cluster_domain), help="of Services")
    run.add_argument("--gateway-url", default=env("GATEWAY_URL", own.gateway_url), help="where gateways are reached")
    run.add_argument(
        "--gateway-pod-url",
        default=env("GATEWAY_POD_URL", own.gateway_pod_url),
        help="where one of their pods is; empty, outside of the cluster: not asked",
    )
    run.add_argument("--workers", type=int, default=env("WORKERS", str(own.workers)), help="objects at a time")
    for name, value, text in (
        ("repair-seconds", own.repair_seconds, "between lists of every kind, ± 20 %%"),
        ("resync-seconds", own.resync_seconds, "between looks at an object when nothing happens, ± 20 %%"),
        (
            "repair-window-seconds",
            own.repair_window_seconds,
            "between repairs of one child that somebody keeps changing",
        ),
    ):
        variable = name.replace("-", "_").upper()
        run.add_argument(f"--{name}", type=float, default=env(variable, str(value)), help=text)
    run.add_argument("--log-level", default=env("LOG_LEVEL", "info"), choices=["debug", "info", "warning", "error"])
    run.add_argument("--log-format", default=env("LOG_FORMAT", "json"), choices=["json", "text"], help="of stderr")


def _list(text: str | None) -> list[str]:
    return [part.strip() for part in (text or "").split(",") if part.strip()]


def _own_namespace() -> str:
    """The pod's namespace, or `default` outside a cluster."""
    return NAMESPACE_FILE.read_text().strip() if NAMESPACE_FILE.exists() else OperatorSettings.lease_namespace


def _identity(environ: Mapping[str, str]) -> str:
    """Never two processes' own: a restarted container must not take its predecessor's Lease for its own."""
    return f"{environ.get('POD_NAME') or socket.gethostname()}-{uuid.uuid4().hex[:8]}"


if __name__ == "__main__":
    raise SystemExit(main())
