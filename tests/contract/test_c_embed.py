"""Contract C, row by row: the embed service's own routes, and its tensors on the common ones."""

import base64
import io
import json
import random
import subprocess
import sys
from importlib.metadata import version

import httpx
import numpy as np
import pytest
import yaml
from PIL import Image

from sightline.maxsim import maxsim
from tests.conftest import ROOT, Server
from tests.hostile import REFUSED_IMAGES, images
from tests.scenes import BACKGROUNDS, RED_CIRCLE, Thing, draw, encoded, random_scene, red_circle

DIM = 128


@pytest.fixture(scope="module")
def embed(session_launcher, s3_server, tmp_path_factory) -> Server:
    folder = tmp_path_factory.mktemp("images")
    (folder / "circle.png").write_bytes(red_circle())
    environment = s3_server.environment()
    return session_launcher.start("embed", "--image-root", str(folder), env=environment).wait_ready()


@pytest.fixture
def http(embed: Server):
    with embed.client() as client:
        yield client


def page(color: str = "blue", width: int = 300, height: int = 200, shape: str = "star") -> bytes:
    thing = Thing("large", color, shape, width / 2, height / 2, 0.2 * min(width, height))
    return encoded(draw([thing], BACKGROUNDS["gray"], width, height, random.Random(1)))


def queries(http: httpx.Client, *texts: str) -> list[np.ndarray]:
    body = http.post("/embed/queries", json={"queries": list(texts)}).json()
    return [np.array(item, np.float32) for item in body["embeddings"]]


def pages(http: httpx.Client, *files: bytes, **data: object) -> list[dict]:
    sent = [("files", (f"{index}.png", file)) for index, file in enumerate(files)]
    response = http.post("/embed/images", files=sent, data=data)
    assert response.status_code == 200, response.text
    return response.json()["embeddings"]


def least_cosine(left: np.ndarray, right: np.ndarray) -> float:
    assert left.shape == right.shape
    return float((left * right).sum(axis=-1).min())


def check_refused(response: httpx.Response, status: int, code: str) -> None:
    assert response.status_code == status, response.text
    assert set(response.json()) == {"detail", "code", "request_id"}
    assert response.json()["code"] == code


class TestC1Greeting:
    def test_says_what_this_is(self, http):
        body = http.get("/").json()
        assert body == {"message": "ColQwen2.5 Embedding API", "version": version("sightline")}


class TestC2Health:
    def test_names_the_device(self, http):
        body = http.get("/health").json()
        assert body["status"] == "healthy"
        assert body["device"] == "cpu" or body["device"].startswith("cuda")


class TestC3Info:
    def test_has_the_keys_of_the_original_with_true_values(self, http):
        body = http.get("/info").json()
        config = json.loads((ROOT / "predictors/src/sightline/tiny/embed/config.json").read_text())
        assert body["version"] == version("sightline")
        assert body["device"] == http.get("/health").json()["device"]
        assert body["dtype"] == "torch.float32"
        assert body["flash_attn"] is False
        assert body["spatial_merge_size"] == config["vision_config"]["spatial_merge_size"]
        assert body["dim"] == DIM == queries(http, "red")[0].shape[1]
        assert body["image_token_id"] == config["image_token_id"]

    def test_says_which_model_and_engine_made_the_vectors(self, http):
        body = http.get("/info").json()
        assert body["model"] == "sightline-tiny-colqwen2.5"
        assert body["demo_model"] is True
        assert body["engine"] == {name: version(name) for name in ("colpali-engine", "transformers", "torch")}

    def test_the_golden_numbers_are_those_of_the_documented_query(self, http):
        golden = http.get("/info").json()["golden"]
        assert len(golden["sha256"]) == 64
        assert golden["first_numbers"] == pytest.approx(queries(http, RED_CIRCLE)[0][0, :8].tolist(), abs=1e-4)


class TestC4Patches:
    SIZES = ((1024, 768), (512, 512), (300, 900), (96, 96), (2000, 1000))

    def test_are_those_that_the_page_then_has(self, http):
        dimensions = [{"width": width, "height": height} for width, height in self.SIZES]
        results = http.post("/patches", json={"dimensions": dimensions}).json()["results"]

        embedded = pages(http, *[page(width=width, height=height) for width, height in self.SIZES])

        assert [{"width": r["width"], "height": r["height"]} for r in results] == dimensions
        for result, item in zip(results, embedded, strict=True):
            assert (result["n_patches_x"], result["n_patches_y"]) == (item["n_patches_x"], item["n_patches_y"])

    def test_x_is_across(self, http):
        (result,) = http.post("/patches", json={"dimensions": [{"width": 800, "height": 400}]}).json()["results"]
        assert result["n_patches_x"] > result["n_patches_y"]

    @pytest.mark.parametrize(
        "bad",
        [
            {"width": 0, "height": 10}, {"width": -5, "height": 10}, {"width": 10}, {}, None, "512x512", [512, 512],
            {"width": "512", "height": 512}, {"width": 10.5, "height": 10}, {"width": True, "height": True},
            {"width": 1000, "height": 4}, {"width": 10**40, "height": 10**40}, {"width": None, "height": 3},
        ],
        ids=str,
    )  # fmt: skip
    def test_a_bad_item_fails_alone(self, http, bad):
        good = {"width": 512, "height": 512}
        response = http.post("/patches", content=json.dumps({"dimensions": [bad, good]}))
        assert response.status_code in {200, 400}, response.text
        if response.status_code == 400:  # a whole number that JSON readers of 64 bits refuse
            assert bad == {"width": 10**40, "height": 10**40}
            return
        first, second = response.json()["results"]
        assert {"width", "height", "error", "code"} == set(first)
        assert second["n_patches_x"] > 0

    @pytest.mark.parametrize("body", [{}, {"dimensions": None}, {"dimensions": {"width": 1}}, {"dimensions": "x"}])
    def test_without_a_list_it_is_422(self, http, body):
        check_refused(http.post("/patches", json=body), 422, "invalid_parameter")

    def test_too_many_are_400(self, http):
        body = {"dimensions": [{"width": 10, "height": 10}] * 1001}
        check_refused(http.post("/patches", json=body), 400, "too_many_items")


class TestC5Queries:
    def test_one_text_is_one_embedding(self, http):
        body = http.post("/embed/queries", json={"queries": "red circle"}).json()
        (vectors,) = body["embeddings"]
        assert np.array(vectors).shape == (body["usage"]["prompt_tokens"], DIM)

    def test_each_has_rows_for_its_own_tokens_and_no_padding(self, http):
        short, long = queries(http, "red", "a small red circle above a large blue star on a white background")
        assert len(short) < len(long)
        assert len(short) == len(queries(http, "red")[0])
        for vectors in (short, long):
            assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-4)

    def test_says_the_tokens_and_that_the_model_is_a_demonstration(self, http):
        body = http.post("/embed/queries", json={"queries": ["red", "blue star"]}).json()
        tokens = sum(len(vectors) for vectors in body["embeddings"])
        assert body["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens, "image_tokens": 0}
        assert (body["model"], body["demo_model"]) == ("sightline-tiny-colqwen2.5", True)

    def test_an_empty_list_is_400(self, http):
        check_refused(http.post("/embed/queries", json={"queries": []}), 400, "nothing_to_embed")

    @pytest.mark.parametrize("value", [None, 5, {"a": 1}, True])
    def test_anything_but_text_is_422(self, http, value):
        check_refused(http.post("/embed/queries", json={"queries": value}), 422, "invalid_parameter")

    @pytest.mark.parametrize("value", ["", "  \n ", ["red", ""], ["red", None]])
    def test_a_blank_text_is_422(self, http, value):
        check_refused(http.post("/embed/queries", json={"queries": value}), 422, "query_blank")

    def test_control_tokens_in_a_text_are_only_text(self, http):
        response = http.post("/embed/queries", json={"queries": "<|image_pad|><|vision_start|>" * 20})
        assert response.status_code == 200

    def test_a_text_longer_than_the_model_reads_is_422(self, http):
        check_refused(http.post("/embed/queries", json={"queries": "é" * 8000}), 422, "prompt_too_long")
        check_refused(http.post("/embed/queries", json={"queries": "a" * 8193}), 422, "invalid_parameter")


class TestC6Images:
    def test_each_has_its_embedding_and_where_its_patches_are(self, http):
        for item in pages(http, red_circle(), page(width=400, height=150)):
            vectors = np.array(item["embedding"])
            start, length = item["image_patch_start"], item["image_patch_len"]
            assert length == item["n_patches_x"] * item["n_patches_y"]
            assert 0 < start < start + length < len(vectors)
            assert vectors.shape[1] == DIM
            assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-4)

    def test_the_span_does_not_move_with_the_company(self, http):
        """The original counts the padding of the longest page."""
        wide, square = page(width=2000, height=1000), page(width=300, height=300)
        together = pages(http, wide, square, wide)
        alone = pages(http, square)
        assert together[1]["image_patch_start"] == alone[0]["image_patch_start"]
        assert len(together[1]["embedding"]) == len(alone[0]["embedding"])

    @pytest.mark.parametrize("name", REFUSED_IMAGES)
    def test_a_file_that_is_no_image_is_400_and_named(self, http, name):
        files = [("files", ("good.png", red_circle())), ("files", ("bad one.png", images()[name]))]
        response = http.post("/embed/images", files=files)
        assert response.status_code in {400, 413}, response.text
        assert "bad one.png" in response.json()["detail"]
        assert response.json()["code"].startswith("image_")

    def test_a_name_is_told_without_what_could_hurt(self, http):
        name = "../../etc/<script>alert(1)</script>\u202e\u0000.png"
        response = http.post("/embed/images", files=[("files", (name, b"no image"))])
        assert response.status_code == 400
        assert not set(response.json()["detail"]) & set("<>\u202e\u0000/")

    @pytest.mark.parametrize("name", ["CMYK", "16 bit", "animated GIF", "turned by EXIF", "grey with alpha", "200:1"])
    def test_odd_but_honest_pictures_are_taken(self, http, name):
        assert pages(http, images()[name])

    def test_no_file_is_400(self, http):
        check_refused(http.post("/embed/images", files=[("other", ("a.png", red_circle()))]), 400, "nothing_to_embed")
        check_refused(http.post("/embed/images", json={}), 400, "nothing_to_embed")

    def test_files_that_are_text_are_422(self, http):
        check_refused(http.post("/embed/images", data={"files": "a.png"}), 422, "invalid_parameter")

    def test_the_same_image_by_every_source_has_the_same_vectors(self, http, s3_server):
        s3_server.bucket("pages")
        uri = s3_server.put("pages", "circle.png", red_circle())
        plain = base64.b64encode(red_circle()).decode()
        sources = [
            f"data:image/png;base64,{plain}", plain, {"b64": plain}, uri, {"s3_uri": uri}, {"image_path": "circle.png"},
            {"image_url": {"url": f"data:image/png;base64,{plain}"}},
        ]  # fmt: skip
        response = http.post("/embed/images", json={"images": sources})
        assert response.status_code == 200, response.text
        uploaded = np.array(pages(http, red_circle())[0]["embedding"])
        raw = http.post("/embed/images", content=red_circle(), headers={"content-type": "image/png"}).json()
        for item in response.json()["embeddings"] + raw["embeddings"]:
            assert least_cosine(np.array(item["embedding"]), uploaded) >= 0.9999

    @pytest.mark.parametrize(
        ("source", "code"),
        [
            ("https://example.com/a.png", "url_not_allowed"),
            ("file:///etc/passwd", "source_scheme_unsupported"),
            ({"image_path": "../../etc/passwd"}, "image_not_found"),
            ({"image_path": "/etc/passwd"}, "image_not_found"),
            ({"image_path": "absent.png"}, "image_not_found"),
            ({}, "image_missing"),
            (5, "image_missing"),
            ("", "image_missing"),
        ],
        ids=str,
    )
    def test_the_policy_of_sources_holds(self, http, source, code):
        response = http.post("/embed/images", json={"images": [source]})
        assert response.status_code == (404 if code == "image_not_found" else 400)
        assert response.json()["code"] == code, response.text
        assert "passwd" not in response.text


class TestC7Errors:
    @pytest.mark.parametrize(
        ("path", "content", "status"),
        [
            ("/embed/queries", b"{", 400),
            ("/embed/queries", b"[]", 422),
            ("/embed/queries", b'{"queries": "a", "encoding_format": "hex"}', 422),
            ("/embed/queries", b'{"queries": "a", "encoding_format": ["float"]}', 422),
            ("/embed/queries", b'{"queries": "a", "pool_factor": 2}', 422),
            ("/embed/images", b'{"images": ["x"], "pool_factor": 0}', 422),
            ("/embed/images", b'{"images": ["x"], "pool_factor": "many"}', 422),
            ("/score", b'{"queries": ["a"]}', 400),
            ("/score", b'{"pages": []}', 422),
            ("/interpret", b'{"query": "a"}', 400),
            ("/interpret", b'{"query": "a", "output": "jpeg"}', 422),
            ("/nowhere", b"{}", 404),
        ],
    )
    def test_have_a_status_a_code_and_an_id(self, http, path, content, status):
        response = http.post(path, content=content, headers={"x-request-id": "mine"})
        assert response.status_code == status, response.text
        assert set(response.json()) == {"detail", "code", "request_id"}
        assert response.headers["x-request-id"] == response.json()["request_id"] == "mine"

    def test_leave_the_server_as_it_was(self, http):
        before = queries(http, "red circle")[0]
        http.post("/embed/images", files=[("files", ("a.png", images()["PNG bomb"]))])
        assert least_cosine(queries(http, "red circle")[0], before) >= 0.9999


class TestC8Batches:
    def test_a_page_has_the_same_vectors_whatever_shares_its_batch(self, http, rng):
        mine = page("green", 500, 280)
        (alone,) = pages(http, mine)
        for count in (2, 7, 32):
            company = [encoded(random_scene(rng, side=rng.randint(96, 400))[0]) for _ in range(count - 1)]
            place = rng.randrange(count)
            files = [*company[:place], mine, *company[place:]]
            found = pages(http, *files)[place]
            assert least_cosine(np.array(found["embedding"]), np.array(alone["embedding"])) >= 0.9999

    def test_a_query_has_the_same_vectors_whatever_shares_its_batch(self, http):
        mine = "a small red circle"
        (alone,) = queries(http, mine)
        company = ["x", "what is this? " * 40, mine, "a star"]
        assert least_cosine(queries(http, *company)[2], alone) >= 0.9999

    async def test_requests_at_the_same_time_do_not_change_each_other(self, embed, http):
        import asyncio

        texts = ["red", "a small red circle " * 9, "a star on a black background", "circle"] * 6
        files = [page(color, 200 + 40 * index, 200) for index, color in enumerate(("red", "blue", "green"))]
        expected = [queries(http, text)[0] for text in texts[:4]] * 6
        seen = [np.array(pages(http, file)[0]["embedding"]) for file in files]
        async with httpx.AsyncClient(base_url=embed.url, timeout=60, trust_env=False) as client:

            async def ask(text: str) -> np.ndarray:
                body = (await client.post("/embed/queries", json={"queries": text})).json()
                return np.array(body["embeddings"][0], np.float32)

            async def show(file: bytes) -> np.ndarray:
                body = (await client.post("/embed/images", files=[("files", ("a", file))])).json()
                return np.array(body["embeddings"][0]["embedding"], np.float32)

            found = await asyncio.gather(*map(ask, texts), *map(show, files))
        for mine, alone in zip(found, expected + seen, strict=True):
            assert least_cosine(mine, alone) >= 0.9999

    def test_more_than_32_are_400(self, http):
        files = [("files", (f"{index}.png", red_circle(16))) for index in range(33)]
        check_refused(http.post("/embed/images", files=files), 400, "too_many_items")
        check_refused(http.post("/embed/queries", json={"queries": ["a"] * 33}), 400, "too_many_items")


class TestC9Encodings:
    def test_base64_is_fp16_little_endian_with_its_shape(self, http):
        plain = queries(http, "red", "blue star")
        body = http.post("/embed/queries", json={"queries": ["red", "blue star"], "encoding_format": "base64"}).json()
        assert (body["encoding_format"], body["dtype"]) == ("base64", "float16")
        for text, shape, vectors in zip(body["embeddings"], body["shapes"], plain, strict=True):
            read = np.frombuffer(base64.b64decode(text), "<f2").reshape(shape)
            assert np.abs(read - vectors).max() < 1e-3

    def test_base64_may_be_fp32(self, http):
        asked = {"queries": "red", "encoding_format": "base64", "dtype": "float32"}
        body = http.post("/embed/queries", json=asked).json()
        read = np.frombuffer(base64.b64decode(body["embeddings"][0]), "<f4").reshape(body["shapes"][0])
        assert np.abs(read - queries(http, "red")[0]).max() < 1e-6

    def test_binary_is_the_sign_of_each_number(self, http):
        (plain,) = pages(http, red_circle())
        (packed,) = pages(http, red_circle(), encoding_format="binary")
        data = np.frombuffer(base64.b64decode(packed["embedding"]), np.uint8).reshape(-1, DIM // 8)
        assert np.array_equal(np.unpackbits(data, axis=1) == 1, np.array(plain["embedding"]) > 0)
        assert packed["shape"] == list(np.array(plain["embedding"]).shape)

    def test_binary_hamming_finds_the_page_too(self, http):
        texts = ["a large red circle on a white background", "a large blue star on a gray background"]
        sent = [red_circle(), page()]
        asked = {"queries": texts, "encoding_format": "binary"}

        def bits(text: str) -> np.ndarray:
            packed = np.frombuffer(base64.b64decode(text), np.uint8).reshape(-1, DIM // 8)
            return np.unpackbits(packed, axis=1).astype(np.float32) * 2 - 1

        said = [bits(text) for text in http.post("/embed/queries", json=asked).json()["embeddings"]]
        seen = [bits(item["embedding"]) for item in pages(http, *sent, encoding_format="binary")]
        assert maxsim(said, seen).argmax(axis=1).tolist() == [0, 1]

    @pytest.mark.parametrize("factor", [2, 3, 10])
    def test_token_pooling_leaves_a_part_of_the_vectors(self, http, factor):
        (plain,) = pages(http, red_circle())
        (pooled,) = pages(http, red_circle(), pool_factor=str(factor))
        vectors = np.array(pooled["embedding"])
        assert len(vectors) <= len(plain["embedding"]) / factor
        assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-4)
        assert pooled["image_patch_start"] is pooled["image_patch_len"] is None

    def test_pooled_pages_are_still_found(self, http):
        sent = [red_circle(), page(), page("green", shape="square"), page("yellow", shape="triangle")]
        texts = [RED_CIRCLE] + [
            f"a large {words} on a gray background" for words in ("blue star", "green square", "yellow triangle")
        ]
        seen = [np.array(item["embedding"], np.float32) for item in pages(http, *sent, pool_factor="3")]
        assert maxsim(queries(http, *texts), seen).argmax(axis=1).tolist() == [0, 1, 2, 3]


class TestC9Tensors:
    """V2, with tritonclient."""

    @pytest.fixture
    def triton(self, embed: Server):
        import tritonclient.http as triton

        client = triton.InferenceServerClient(embed.url.removeprefix("http://"))
        yield client
        client.close()

    @staticmethod
    def inputs(files: list[bytes], texts: list[str], *, binary: bool = True) -> list:
        import tritonclient.http as triton

        found = []
        for name, values in (("image", files), ("query", [text.encode() for text in texts])):
            if values:
                tensor = triton.InferInput(name, [len(values)], "BYTES")
                tensor.set_data_from_numpy(np.array(values, dtype=object), binary_data=binary)
                found.append(tensor)
        return found

    def test_hold_all_vectors_with_offsets_and_spans(self, http, triton):
        files, texts = [red_circle(), page(width=400, height=150)], ["red", "a large blue star"]
        result = triton.infer("embed", self.inputs(files, texts))

        vectors, offsets, spans = (result.as_numpy(name) for name in ("vectors", "offsets", "image_span"))

        assert vectors.dtype == np.float32
        assert offsets[0] == 0
        assert offsets[-1] == len(vectors)
        seen = pages(http, *files)
        expected = [np.array(item["embedding"], np.float32) for item in seen] + queries(http, *texts)
        for index, plain in enumerate(expected):
            assert least_cosine(vectors[offsets[index] : offsets[index + 1]], plain) >= 0.9999
        assert spans.tolist() == [[item["image_patch_start"], item["image_patch_len"]] for item in seen] + [[-1, 0]] * 2

    @pytest.mark.parametrize("dtype", ["FP32", "FP16"])
    def test_may_be_fp16(self, http, triton, dtype):
        import tritonclient.http as client

        wanted = [client.InferRequestedOutput("vectors", binary_data=True)]
        result = triton.infer("embed", self.inputs([], ["red"]), outputs=wanted, parameters={"dtype": dtype})
        vectors = result.as_numpy("vectors")
        assert vectors.dtype == (np.float16 if dtype == "FP16" else np.float32)
        assert np.abs(vectors - queries(http, "red")[0]).max() < 1e-3

    def test_fp16_in_json_is_a_clear_400(self, http):
        tensor = {"name": "query", "datatype": "BYTES", "shape": [1], "data": ["red"]}
        body = {"inputs": [tensor], "parameters": {"dtype": "FP16"}}
        response = http.post("/v2/models/embed/infer", json=body)
        assert response.status_code == 400
        assert response.json()["code"] == "fp16_needs_binary"
        body["outputs"] = [{"name": "offsets"}]
        assert http.post("/v2/models/embed/infer", json=body).status_code == 200

    def test_in_json_are_numbers(self, http):
        tensor = {"name": "query", "datatype": "BYTES", "shape": [1], "data": ["red"]}
        body = http.post("/v2/models/embed/infer", json={"inputs": [tensor]}).json()
        outputs = {item["name"]: item for item in body["outputs"]}
        assert outputs["vectors"]["datatype"] == "FP32"
        found = np.array(outputs["vectors"]["data"], np.float32).reshape(outputs["vectors"]["shape"])
        assert least_cosine(found, queries(http, "red")[0]) >= 0.9999

    @pytest.mark.parametrize("parameters", [{"dtype": "FP64"}, {"dtype": 16}, {"pool_factor": 0}])
    def test_bad_parameters_are_422(self, http, parameters):
        tensor = {"name": "query", "datatype": "BYTES", "shape": [1], "data": ["red"]}
        response = http.post("/v2/models/embed/infer", json={"inputs": [tensor], "parameters": parameters})
        assert response.status_code == 422, response.text

    def test_metadata_names_them(self, http):
        body = http.get("/v2/models/embed").json()
        assert {item["name"]: item["datatype"] for item in body["inputs"]} == {"image": "BYTES", "query": "BYTES"}
        assert {item["name"]: (item["datatype"], item["shape"]) for item in body["outputs"]} == {
            "vectors": ("FP32", [-1, -1]),
            "offsets": ("INT64", [-1]),
            "image_span": ("INT64", [-1, 2]),
        }
        assert body["parameters"]["dim"] == DIM

    def test_v1_embeds_images_and_queries(self, http):
        plain = base64.b64encode(red_circle()).decode()
        instances = [{"image": plain}, {"query": "red"}, {"b64": plain, "pool_factor": 3}]
        predictions = http.post("/v1/models/embed:predict", json={"instances": instances}).json()["predictions"]
        assert np.array(predictions[0]["embedding"]).shape[0] == predictions[0]["usage"]["prompt_tokens"]
        assert least_cosine(np.array(predictions[1]["embedding"]), queries(http, "red")[0]) >= 0.9999
        assert len(predictions[2]["embedding"]) < len(predictions[0]["embedding"])


class TestC9OpenAI:
    @pytest.fixture(params=["/v1", "/openai/v1"])
    def openai(self, embed: Server, request):
        from openai import OpenAI

        with OpenAI(base_url=f"{embed.url}{request.param}", api_key="none", max_retries=0) as client:
            yield client

    def test_its_client_gets_a_flat_list_and_the_shape_that_folds_it(self, http, openai):
        """Named no format, the client asks for base64, reads float32 and flattens."""
        answer = openai.embeddings.create(model="embed", input=["red", "a large blue star"])

        plain = queries(http, "red", "a large blue star")
        for item, vectors in zip(answer.data, plain, strict=True):
            assert least_cosine(np.array(item.embedding).reshape(item.shape), vectors) >= 0.9999
        assert [item.index for item in answer.data] == [0, 1]
        assert answer.usage.prompt_tokens == answer.usage.total_tokens == sum(map(len, plain))
        assert answer.model == "sightline-tiny-colqwen2.5"

    def test_asked_for_floats_it_gets_a_list_of_vectors(self, http, openai):
        answer = openai.embeddings.create(model="embed", input="red", encoding_format="float")
        assert least_cosine(np.array(answer.data[0].embedding), queries(http, "red")[0]) >= 0.9999

    def test_takes_images_as_content_parts(self, http, openai):
        url = "data:image/png;base64," + base64.b64encode(red_circle()).decode()
        parts = [
            {"type": "image_url", "image_url": {"url": url}},
            {"type": "input_image", "image_url": url},
            {"type": "text", "text": RED_CIRCLE},
        ]
        answer = openai.embeddings.create(model="embed", input=parts)
        found = [np.array(item.embedding, np.float32).reshape(item.shape) for item in answer.data]
        (plain,) = pages(http, red_circle())
        assert least_cosine(found[0], np.array(plain["embedding"])) >= 0.9999
        assert least_cosine(found[1], found[0]) >= 0.9999
        assert least_cosine(found[2], queries(http, RED_CIRCLE)[0]) >= 0.9999
        assert answer.data[0].image_patch_start == plain["image_patch_start"]

    @pytest.mark.parametrize(
        "options",
        [
            {"input": []}, {"input": [1, 2, 3]}, {"input": ""}, {"input": [[1, 2]]}, {"input": "a", "dimensions": 64},
            {"input": [{"type": "image_url"}]}, {"input": [{"type": ["text"], "text": "a"}]},
        ],
        ids=str,
    )  # fmt: skip
    def test_what_it_cannot_embed_is_a_bad_request(self, openai, options):
        from openai import BadRequestError, UnprocessableEntityError

        with pytest.raises((BadRequestError, UnprocessableEntityError)) as caught:
            openai.embeddings.create(model="embed", **options)
        assert caught.value.code

    def test_another_model_is_not_found(self, openai):
        from openai import NotFoundError

        with pytest.raises(NotFoundError) as caught:
            openai.embeddings.create(model="text-embedding-3-small", input="a")
        assert caught.value.code == "model_not_found"

    def test_a_model_that_is_no_text_is_a_bad_request(self, http):
        assert http.post("/v1/embeddings", json={"model": ["embed"], "input": "a"}).status_code == 404


class TestC10Score:
    TEXTS = (RED_CIRCLE, "a large blue star on a gray background")

    def scores(self, http: httpx.Client, body: dict) -> np.ndarray:
        response = http.post("/score", json=body)
        assert response.status_code == 200, response.text
        return np.array(response.json()["scores"], np.float32)

    @staticmethod
    def data_uri(file: bytes) -> str:
        return "data:image/png;base64," + base64.b64encode(file).decode()

    def test_is_maxsim_of_every_query_against_every_page(self, http):
        sent = [page(), red_circle()]
        body = {"queries": list(self.TEXTS), "images": [self.data_uri(file) for file in sent]}
        response = http.post("/score", json=body).json()
        seen = [np.array(item["embedding"], np.float32) for item in pages(http, *sent)]
        assert np.array(response["scores"]) == pytest.approx(maxsim(queries(http, *self.TEXTS), seen), abs=1e-3)
        assert response["ranking"] == [[1, 0], [0, 1]]

    def test_takes_vectors_in_place_of_texts_and_images(self, http):
        said = http.post("/embed/queries", json={"queries": list(self.TEXTS)}).json()["embeddings"]
        seen = [item["embedding"] for item in pages(http, page(), red_circle())]
        packed = pages(http, page(), red_circle(), encoding_format="base64")
        whole = self.scores(
            http, {"queries": list(self.TEXTS), "pages": [self.data_uri(page()), self.data_uri(red_circle())]}
        )
        assert self.scores(http, {"queries": said, "pages": seen}) == pytest.approx(whole, abs=1e-3)
        assert self.scores(http, {"queries": list(self.TEXTS), "pages": packed}) == pytest.approx(whole, abs=0.05)
        mixed = {"queries": [said[0], self.TEXTS[1]], "pages": [{"vectors": seen[0]}, self.data_uri(red_circle())]}
        assert self.scores(http, mixed) == pytest.approx(whole, abs=1e-3)

    def test_takes_uploads(self, http):
        files = [("files", ("a.png", page())), ("files", ("b.png", red_circle()))]
        body = http.post("/score", data={"queries": list(self.TEXTS)}, files=files).json()
        assert body["ranking"] == [[1, 0], [0, 1]]

    def test_a_page_scores_the_same_whatever_stands_beside_it(self, http):
        """Pages are not padded: a negative score stays negative beside a longer page."""
        (query,) = queries(http, "red circle")
        opposite = (-query[:1]).tolist()
        longer = np.tile(-query[:1], (50, 1)).tolist()
        alone = self.scores(http, {"queries": [query[:1].tolist()], "pages": [opposite]})
        beside = self.scores(http, {"queries": [query[:1].tolist()], "pages": [opposite, longer]})
        assert alone[0, 0] == pytest.approx(-1, abs=1e-4)
        assert beside[0] == pytest.approx([-1, -1], abs=1e-4)

    @pytest.mark.parametrize(
        ("body", "code"),
        [
            ({"queries": [[[0.0] * 64]], "pages": [[[0.0] * DIM]]}, "vectors_invalid"),
            ({"queries": ["a"], "pages": [[]]}, "vectors_invalid"),
            ({"queries": ["a"], "pages": [{"embedding": "!!"}]}, "vectors_invalid"),
            ({"queries": ["a"], "pages": [{"vectors": None}]}, "vectors_invalid"),
            ({"queries": [], "pages": [[[0.0] * DIM]]}, "nothing_to_embed"),
            ({"queries": ["a"], "pages": []}, "nothing_to_embed"),
            ({"queries": ["a"], "pages": [[[0.0] * DIM]] * 257}, "too_many_items"),
            ({"queries": ["a"], "pages": ["eA=="] * 33}, "too_many_items"),
            ({"queries": "", "pages": [[[0.0] * DIM]]}, "query_blank"),
        ],
        ids=["width", "empty page", "base64", "null", "no query", "no page", "257 pages", "33 images", "blank"],
    )
    def test_what_cannot_be_scored_is_refused(self, http, body, code):
        response = http.post("/score", json=body)
        assert response.status_code in {400, 422}
        assert response.json()["code"] == code, response.text

    def test_too_many_vectors_are_refused_before_they_cost_anything(self, http):
        def packed(rows: int) -> dict:
            return {"embedding": base64.b64encode(np.zeros((rows, DIM), "<f2").tobytes()).decode()}

        response = http.post("/score", json={"queries": [packed(30_000)], "pages": [packed(30_000)]})
        assert response.json()["code"] == "too_many_vectors"


class TestC10Interpret:
    def test_gives_each_token_a_grid_over_the_page(self, http):
        response = http.post("/interpret", data={"query": "red circle"}, files={"image": red_circle()})
        assert response.status_code == 200, response.text
        body = response.json()
        assert "".join(token["token"] for token in body["tokens"]) == "red circle"
        (seen,) = pages(http, red_circle())
        vectors, start = np.array(seen["embedding"]), seen["image_patch_start"]
        patches = vectors[start : start + seen["image_patch_len"]]
        (query,) = queries(http, "red circle")
        for token in body["tokens"]:
            grid = np.array(token["grid"])
            assert grid.shape == (body["n_patches_y"], body["n_patches_x"])
            assert grid.ravel() == pytest.approx(patches @ query[token["index"]], abs=1e-3)
            assert token["max_similarity"] == pytest.approx(grid.max(), abs=1e-5)
            assert token["is_augmentation"] is False
        assert body["score"] == pytest.approx(float(maxsim([query], [vectors.astype(np.float32)])[0, 0]), abs=1e-3)

    def test_points_at_the_thing_that_the_query_names(self, http):
        """Red left, blue right; within a patch or two, as causal attention smears to the right and down."""
        width = 400
        things = [Thing("large", "red", "circle", 100, 100, 40), Thing("large", "blue", "square", 300, 100, 40)]
        picture = encoded(draw(things, BACKGROUNDS["white"], width, 200, random.Random(1)))
        for words, side in (("red circle", 0), ("blue square", 1)):
            body = http.post("/interpret", data={"query": words}, files={"image": picture}).json()
            best = int(np.array(body["mean"]["grid"]).argmax()) % body["n_patches_x"]
            assert best // (body["n_patches_x"] / 2) == side, (words, best)

    def test_draws_the_same_over_the_picture(self, http):
        picture = page(width=1500, height=1000)
        body = http.post("/interpret", data={"query": "blue star", "output": "png"}, files={"image": picture}).json()
        for drawn in [body["mean"], *body["tokens"]]:
            assert "grid" not in drawn
            overlay = Image.open(io.BytesIO(base64.b64decode(drawn["overlay"])))
            assert overlay.format == "PNG"
            assert overlay.size == (512, 341)
        assert body["low"] < body["high"]

    def test_shows_the_tokens_that_are_asked_for(self, http):
        asked = {
            "query": "red circle",
            "image": TestC10Score.data_uri(red_circle()),
            "tokens": [1, 11],
            "output": "both",
        }
        body = http.post("/interpret", json=asked).json()
        assert [(token["index"], token["is_augmentation"]) for token in body["tokens"]] == [(1, False), (11, True)]
        assert all(token["grid"] and token["overlay"] for token in body["tokens"])

    @pytest.mark.parametrize("tokens", [[], [99], [-1], ["0"], "0", [True], {"a": 1}])
    def test_tokens_that_are_none_are_422(self, http, tokens):
        body = {"query": "red", "image": TestC10Score.data_uri(red_circle()), "tokens": tokens}
        check_refused(http.post("/interpret", json=body), 422, "invalid_parameter")

    def test_more_overlays_than_32_are_422(self, http):
        body = {"query": "red circle " * 20, "image": TestC10Score.data_uri(red_circle()), "output": "png"}
        check_refused(http.post("/interpret", json=body), 422, "too_many_items")

    def test_several_images_are_400(self, http):
        images_ = [TestC10Score.data_uri(red_circle())] * 2
        check_refused(http.post("/interpret", json={"query": "red", "images": images_}), 400, "too_many_items")


class TestC11OpenAPI:
    def test_is_written_by_one_command_and_documents_every_route(self, http):
        kept = json.loads((ROOT / "docs/openapi/embed.json").read_text())
        served = http.get("/openapi.json").json()
        own = {
            "/", "/health", "/info", "/patches", "/embed/queries", "/embed/images", "/score", "/interpret",
            "/v1/embeddings",
        }  # fmt: skip
        assert own <= set(kept["paths"])
        assert own <= set(served["paths"])
        assert http.get("/docs").status_code == 200

    def test_needs_no_model(self):
        program = (
            "import sys, sightline.services.embed;"
            "assert not {'torch', 'transformers', 'colpali_engine', 'kserve'} & set(sys.modules)"
        )
        subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


class TestC12Compose:
    @pytest.mark.parametrize(
        ("service", "port", "device", "model"),
        [("embed", 7001, "cpu", ""), ("embed-gpu", 7002, "cuda", "vidore/colqwen2.5-v0.2")],
    )
    def test_has_the_ports_of_the_original_and_its_cache(self, service, port, device, model):
        compose = yaml.safe_load((ROOT / "compose.yaml").read_text())
        described = compose["services"][service]
        assert any(f":{port}:" in published for published in described["ports"])
        assert any(volume.startswith("hf-cache:") for volume in described["volumes"])
        assert described["environment"]["DEVICE"] == device
        assert described["environment"]["EMBED__MODEL"] == f"${{EMBED__MODEL:-{model}}}"
        assert "hf-cache" in compose["volumes"]
