"""What the embedding service's routes say about themselves in the OpenAPI document."""

from typing import Any

Json = dict[str, Any]

_VECTORS: Json = {"type": "array", "items": {"type": "array", "items": {"type": "number"}}}
_EMBEDDING: Json = {
    "oneOf": [_VECTORS, {"type": "string", "format": "byte"}],
    "description": "float: a vector for each token. base64: little-endian numbers row by row. "
    "binary: a bit for each number, 1 where it is positive, highest bit first.",
}
_WHOLE: Json = {"type": "integer", "minimum": 0}
_SHAPE: Json = {"type": "array", "items": _WHOLE, "description": "Vectors, and numbers of each."}
_IMAGE: Json = {
    "description": "A data URI, base64, an allowed https:// URL or s3:// URI; "
    "or an object with image_url, s3_uri, b64 or image_path (below the server's mounted folder).",
    "oneOf": [
        {"type": "string"},
        {
            "type": "object",
            "properties": {
                "image_url": {"type": "string"},
                "s3_uri": {"type": "string"},
                "b64": {"type": "string"},
                "image_path": {"type": "string"},
            },
        },
    ],
}
_OPTIONS: Json = {
    "encoding_format": {"type": "string", "enum": ["float", "base64", "binary"], "default": "float"},
    "dtype": {
        "type": "string",
        "enum": ["float16", "float32"],
        "description": "Of base64 numbers; float16 by default, float32 on the OpenAI route.",
    },
}
_POOL: Json = {
    "pool_factor": {
        "type": "integer",
        "minimum": 1,
        "maximum": 100,
        "default": 1,
        "description": "Hierarchical token pooling: about this many of a page's vectors become one. "
        "Order is lost, so image_patch_start and image_patch_len are null then.",
    }
}
_FILES: Json = {"type": "array", "items": {"type": "string", "format": "binary"}, "maxItems": 32}
_USAGE: Json = {
    "model": {"type": "string"},
    "demo_model": {"type": "boolean", "description": "There when the answer is a demonstration model's."},
    "usage": {
        "type": "object",
        "properties": {"prompt_tokens": _WHOLE, "total_tokens": _WHOLE, "image_tokens": _WHOLE},
    },
}
_PAGE: Json = {
    "embedding": _EMBEDDING,
    "shape": _SHAPE,
    "image_patch_start": {
        "type": ["integer", "null"],
        "description": "First vector that stands for a patch; the sequence has no padding.",
    },
    "image_patch_len": {"type": ["integer", "null"]},
    "n_patches_x": _WHOLE,
    "n_patches_y": _WHOLE,
    "downscaled": {"type": "boolean", "description": "The page was seen at half its pixels, for lack of memory."},
    "error": {"type": "string", "description": "Instead of the rest, when this page alone failed."},
    "code": {"type": "string"},
}
_GRID: Json = {"type": "array", "items": {"type": "array", "items": {"type": "number"}}, "description": "Row by row."}
_OVERLAY: Json = {"type": "string", "format": "byte", "description": "PNG over the page, longest side 512 pixels."}


def _object(properties: Json, required: list[str] | None = None) -> Json:
    schema: Json = {"type": "object", "properties": properties}
    return schema | ({"required": required} if required else {})


def _body(json: Json, form: Json | None = None) -> Json:
    content: Json = {"application/json": {"schema": json}}
    if form is not None:
        content["multipart/form-data"] = {"schema": form}
    return {"required": True, "content": content}


def _answers(properties: Json, body: Json | None = None) -> Json:
    documented: Json = {
        "responses": {
            "200": {
                "description": "Successful Response",
                "content": {"application/json": {"schema": _object(properties)}},
            }
        }
    }
    return documented | ({"requestBody": body} if body else {})


GREET = _answers({"message": {"type": "string"}, "version": {"type": "string"}})

HEALTH = _answers(
    {
        "status": {"type": "string", "enum": ["healthy"]},
        "device": {"type": ["string", "null"], "description": "cuda:0, cpu; null while the model loads."},
    }
)

INFO = _answers(
    {
        "version": {"type": "string"},
        "device": {"type": "string"},
        "dtype": {"type": "string", "example": "torch.bfloat16"},
        "flash_attn": {"type": "boolean", "description": "Whether flash-attention 2 is in use."},
        "spatial_merge_size": _WHOLE,
        "dim": _WHOLE,
        "image_token_id": _WHOLE,
        "model": {"type": "string"},
        "model_revision": {"type": "string"},
        "demo_model": {"type": "boolean"},
        "engine": {"type": "object", "additionalProperties": {"type": "string"}},
        "golden": _object(
            {
                "sha256": {
                    "type": "string",
                    "description": "Of the vectors of a fixed query and page, rounded to three decimals: "
                    "equal for equal weights, libraries and hardware.",
                },
                "first_numbers": {
                    "type": "array",
                    "items": {"type": "number"},
                    "description": "The first eight numbers of that query, to compare across hardware.",
                },
            }
        ),
        "max_images_per_call": _WHOLE,
    }
)

_DIMENSION: Json = {"width": {"type": "integer"}, "height": {"type": "integer"}}

PATCHES = _answers(
    {
        "results": {
            "type": "array",
            "items": _object(
                {
                    "width": {"type": ["integer", "null"]},
                    "height": {"type": ["integer", "null"]},
                    "n_patches_x": _WHOLE,
                    "n_patches_y": _WHOLE,
                    "error": {"type": "string", "description": "Instead of the patches, when this size is bad."},
                    "code": {"type": "string"},
                }
            ),
        }
    },
    _body(
        _object(
            {"dimensions": {"type": "array", "items": _object(_DIMENSION, ["width", "height"]), "maxItems": 1000}},
            ["dimensions"],
        )
    ),
)

QUERIES = _answers(
    {
        "embeddings": {"type": "array", "items": _EMBEDDING},
        "shapes": {"type": "array", "items": _SHAPE, "description": "Unless encoding_format is float."},
        **_USAGE,
    },
    _body(
        _object(
            {
                "queries": {
                    "oneOf": [
                        {"type": "string"},
                        {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": 32},
                    ]
                },
                **_OPTIONS,
            },
            ["queries"],
        )
    ),
)

IMAGES = _answers(
    {"embeddings": {"type": "array", "items": _object(_PAGE)}, "pool_factor": _WHOLE, **_USAGE},
    _body(
        _object({"images": {"type": "array", "items": _IMAGE, "minItems": 1, "maxItems": 32}, **_OPTIONS, **_POOL}),
        _object({"files": _FILES, **_OPTIONS, **_POOL}),
    ),
)

_SENT_VECTORS: Json = {
    "description": "Vectors as this service gave them.",
    "oneOf": [
        _VECTORS,
        _object({"vectors": _VECTORS}),
        _object({"embedding": {"type": "string"}, "dtype": {"type": "string", "default": "float16"}}),
    ],
}

SCORE = _answers(
    {
        "scores": {**_GRID, "description": "A row for each query, a column for each page; larger is better."},
        "ranking": {
            "type": "array",
            "items": {"type": "array", "items": _WHOLE},
            "description": "For each query the pages from best to worst.",
        },
        **_USAGE,
    },
    _body(
        _object(
            {
                "queries": {"type": "array", "items": {"oneOf": [{"type": "string"}, _SENT_VECTORS]}, "maxItems": 32},
                "pages": {"type": "array", "items": {"oneOf": [_IMAGE, _SENT_VECTORS]}, "maxItems": 256},
                "images": {"type": "array", "items": _IMAGE, "maxItems": 32},
            },
            ["queries"],
        ),
        _object({"queries": {"type": "array", "items": {"type": "string"}}, "files": _FILES}, ["queries"]),
    ),
)

_INTERPRET: Json = {
    "query": {"type": "string"},
    "output": {"type": "string", "enum": ["grid", "png", "both"], "default": "grid"},
    "tokens": {
        "type": "array",
        "items": _WHOLE,
        "description": "Which tokens of the query; default: all but the augmentation tokens.",
    },
}

INTERPRET = _answers(
    {
        "n_patches_x": _WHOLE,
        "n_patches_y": _WHOLE,
        "score": {"type": "number", "description": "MaxSim of query and page."},
        "low": {"type": "number", "description": "Similarity that overlays draw darkest."},
        "high": {"type": "number", "description": "Similarity that overlays draw brightest."},
        "mean": _object({"grid": _GRID, "overlay": _OVERLAY}),
        "tokens": {
            "type": "array",
            "items": _object(
                {
                    "index": _WHOLE,
                    "token": {"type": "string"},
                    "is_augmentation": {"type": "boolean"},
                    "max_similarity": {"type": "number"},
                    "grid": _GRID,
                    "overlay": _OVERLAY,
                }
            ),
        },
        **_USAGE,
    },
    _body(
        _object({**_INTERPRET, "image": _IMAGE}, ["query", "image"]),
        _object({**_INTERPRET, "image": {"type": "string", "format": "binary"}}, ["query", "image"]),
    ),
)

_PART: Json = {
    "oneOf": [
        {"type": "string", "description": "A query."},
        _object({"type": {"type": "string", "enum": ["text", "input_text"]}, "text": {"type": "string"}}),
        _object(
            {
                "type": {"type": "string", "enum": ["image_url", "input_image"]},
                "image_url": {
                    "oneOf": [
                        {"type": "string"},
                        _object({"url": {"type": "string"}}, ["url"]),
                    ]
                },
            }
        ),
    ]
}

OPENAI = _answers(
    {
        "object": {"type": "string", "enum": ["list"]},
        "data": {
            "type": "array",
            "items": _object(
                {"object": {"type": "string", "enum": ["embedding"]}, "index": _WHOLE, **_PAGE},
            ),
        },
        **_USAGE,
    },
    _body(
        _object(
            {
                "model": {"type": "string"},
                "input": {"oneOf": [_PART, {"type": "array", "items": _PART, "minItems": 1, "maxItems": 32}]},
                "dimensions": {"type": "integer", "description": "Must be the model's own when given."},
                "user": {"type": "string"},
                **_OPTIONS,
                **_POOL,
            },
            ["input"],
        )
    ),
)
"""OpenAI's client asks for base64 when its user names no format, and hands out one flat list of float32: `shape` folds
it back, as in `numpy.reshape(item.embedding, item.shape)`."""
