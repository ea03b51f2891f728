"""`sightline render`: it prints what the operator applies, and names what is wrong by file, document and field."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from sightline_operator.__main__ import _parser
from sightline_operator.render import OPTIONAL_KINDS, render_batch, render_pipeline
from sightline_operator.render.cli import as_yaml, environment_of, main
from sightline_operator.settings import RenderSettings
from tests.operator.objects import batch, pipeline
from tests.operator.rendering import PLAN, SAMPLES

ROOT = Path(__file__).parents[2]


@pytest.fixture
def write(tmp_path: Path):
    def write(*documents: object, name: str = "pipeline.yaml") -> str:
        path = tmp_path / name
        texts = [each if isinstance(each, str) else yaml.safe_dump(each) for each in documents]
        path.write_text("---\n".join(texts))
        return str(path)

    return write


def test_what_it_prints_is_what_the_operator_applies(write, capsys) -> None:
    assert main(["-f", write(pipeline())]) == 0
    told = capsys.readouterr().out
    assert told == as_yaml(render_pipeline(pipeline(), RenderSettings(), OPTIONAL_KINDS))
    assert list(yaml.safe_load_all(told)) == list(render_pipeline(pipeline(), RenderSettings()))


def test_a_batch_takes_its_pipeline_and_its_plan(write, tmp_path, capsys) -> None:
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps(PLAN))
    assert main(["-f", write(pipeline(), batch()), "--plan", str(plan)]) == 0
    children = list(yaml.safe_load_all(capsys.readouterr().out))
    expected = render_batch(batch(), pipeline(), PLAN, RenderSettings())
    assert children[-len(expected) :] == list(expected.values())


def test_options_are_those_of_the_operator(write, capsys) -> None:
    bare = pipeline()
    del bare["metadata"]["namespace"]
    words = ["--image", "describe=mirror.example/d:2", "--deployment-mode", "Knative", "-n", "vision"]
    assert main(["-f", write(bare), *words, "--without", "ServiceMonitor"]) == 0
    told = capsys.readouterr().out
    assert "image: mirror.example/d:2" in told
    assert "serving.kserve.io/deploymentMode: Knative" in told
    assert {child["metadata"]["namespace"] for child in yaml.safe_load_all(told)} == {"vision"}


def test_several_files_a_list_and_empty_documents(write, capsys) -> None:
    one = write("", pipeline(name="one"), "", name="one.yaml")
    both = write(
        {"apiVersion": "v1", "kind": "List", "items": [pipeline(name="two"), pipeline(name="three")]}, name="list.yaml"
    )
    assert main(["-f", one, "-f", both]) == 0
    names = {
        child["metadata"]["labels"]["sightline.dev/pipeline"] for child in yaml.safe_load_all(capsys.readouterr().out)
    }
    assert names == {"one", "two", "three"}


def test_objects_of_other_kinds_are_passed_over_aloud(write, capsys) -> None:
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "keys"}}
    assert main(["-f", write(secret, pipeline())]) == 0
    told = capsys.readouterr()
    assert "document 1: Secret is not rendered" in told.err
    assert "kind: Secret" not in told.out


@pytest.mark.parametrize(
    ("documents", "line"),
    [
        ([pipeline(), pipeline({"caption.timeout": "soon"})], "document 2: spec.caption.timeout: String should match"),
        (
            [pipeline({"caption.inferenceServce": {}})],
            "document 1: spec.caption.inferenceServce: no field is",
        ),
        (
            [pipeline({"caption.inferenceService": {"tolerations": [{"kye": "a"}]}})],
            "spec.caption.inferenceService.tolerations[0].kye: no field is called so",
        ),
        (
            [pipeline({"caption": {}})],
            "spec.caption: exactly one of inferenceService, inferenceServiceRef",
        ),
        ([{**pipeline(), "spec": None}], "document 1: spec: is missing"),
        ([{**pipeline(), "metadata": {}}], "document 1: metadata.name: is missing"),
        ([{**pipeline(), "apiVersion": "sightline.dev/v9"}], "apiVersion: must be sightline.dev/v1alpha1"),
        ([batch()], "spec.pipelineRef.name: VisionPipeline docs is in none of the files"),
        (["- just\n- a list\n"], "document 1: must be an object"),
        (["a: b: c\n"], "not YAML"),
        ([{"kind": "Service", "metadata": {"name": "x"}}], "no VisionPipeline and no VisionBatch in there"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_wrong_is_named_by_file_document_and_field(documents, line, write, capsys) -> None:
    path = write(*documents)
    assert main(["-f", path]) == 1
    told = capsys.readouterr()
    assert told.out == ""
    assert line in told.err
    assert path in told.err


def test_a_file_that_is_not_there_and_an_image_of_nothing(write, capsys) -> None:
    assert main(["-f", "/nowhere.yaml"]) == 1
    assert "/nowhere.yaml" in capsys.readouterr().err
    assert main(["-f", write(pipeline()), "--image", "describer=x"]) == 1
    assert "--image describer=x: must be NAME=IMAGE" in capsys.readouterr().err


def test_the_rendered_samples_are_up_to_date() -> None:
    """What `make manifests` writes."""
    told = subprocess.run(
        [sys.executable, "-c", "import json, sys; sys.path.insert(0, 'scripts'); import manifests; "
         "print(json.dumps(manifests.rendered()))"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    )  # fmt: skip
    for name, text in json.loads(told.stdout).items():
        assert (ROOT / "manifests" / "rendered" / name).read_text() == text, f"{name}: run make manifests"
    rendered = {path.name for path in (ROOT / "manifests" / "rendered").glob("*.yaml")}
    assert rendered == {path.name for path in SAMPLES.glob("*.yaml")}


def test_workers_get_the_variables_that_they_are_to_have(write, capsys) -> None:
    path = write(pipeline(), batch())
    assert main(["-f", path, "--worker-env", "HTTPS_PROXY=http://proxy.example:3128"]) == 0
    (plan,) = (child for child in yaml.safe_load_all(capsys.readouterr().out) if child["kind"] == "Job")
    environment = {row["name"]: row["value"] for row in plan["spec"]["template"]["spec"]["containers"][0]["env"]}
    assert environment["HTTPS_PROXY"] == "http://proxy.example:3128"
    assert main(["-f", path, "--worker-env", "no proxy"]) == 1
    assert "--worker-env no proxy: must be NAME=VALUE" in capsys.readouterr().err


def test_a_variable_of_the_operator_may_hold_several_of_the_workers() -> None:
    told = {"SIGHTLINE_OPERATOR_WORKER_ENV": "HTTPS_PROXY=http://p:1,NO_PROXY=.svc,10.0.0.0/8,A_1="}
    options = _parser(told).parse_args(["run"])
    assert environment_of(options.worker_env) == {
        "HTTPS_PROXY": "http://p:1",
        "NO_PROXY": ".svc,10.0.0.0/8",
        "A_1": "",
    }


def test_a_retry_is_rendered_with_the_earlier_batch_as_the_cluster_has_it(write, capsys) -> None:
    again = batch({"input": {"retryOf": {"batchName": "night"}}}, name="again")
    assert main(["-f", write(pipeline(), again)]) == 1
    assert "VisionBatch night is not known, or has no uid and no status.fingerprint yet" in capsys.readouterr().err
    night = batch() | {"status": {"fingerprint": "0123456789ab"}}
    night["metadata"]["uid"] = "9b2f"
    assert main(["-f", write(pipeline(), again, night)]) == 0
    assert '"prefix": "9b2f/0123456789ab/"' in capsys.readouterr().out


# --- from the other distribution -------------------------------------------------------------------------------------


def sightline(*words: str, code: str = "") -> subprocess.CompletedProcess[str]:
    program = f"{code}\nimport sys\nfrom sightline.cli import main\nsys.argv = {['sightline', *words]!r}\nmain()\n"
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)


def test_the_command_of_the_predictors_is_the_same(write, capsys) -> None:
    path = write(pipeline())
    told = sightline("render", "-f", path)
    assert told.returncode == 0, told.stderr
    assert main(["-f", path]) == 0
    assert told.stdout == capsys.readouterr().out


def test_without_the_operator_it_says_how_to_get_it(write) -> None:
    told = sightline("render", "-f", write(pipeline()), code="import sys\nsys.modules['sightline_operator'] = None")
    assert told.returncode == 1
    assert told.stdout == ""
    assert told.stderr == "sightline: `render` is the operator's: pip install sightline-operator\n"
