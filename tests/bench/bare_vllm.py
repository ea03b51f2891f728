"""vLLM's AsyncLLM behind the least of FastAPI: what our engine `vllm` is measured beside.

PYTHON_WITH_VLLM tests/bench/bare_vllm.py FOLDER TOKENS PORT
"""

import asyncio
import contextlib
import io
import sys
import uuid
from collections.abc import AsyncIterator

import uvicorn
from fastapi import Body, FastAPI
from PIL import Image
from transformers import AutoProcessor
from vllm import SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM

PROMPT = "Describe this image in detail"


def build(folder: str, tokens: int) -> FastAPI:
    content = [{"type": "image"}, {"type": "text", "text": PROMPT}]
    processor = AutoProcessor.from_pretrained(folder)
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    # No memory for caches of images or prefixes: every server here computes every picture.
    told = AsyncEngineArgs(
        model=folder, max_model_len=1024, max_num_seqs=128, enforce_eager=True, enable_prefix_caching=False,
        mm_processor_cache_gb=0, limit_mm_per_prompt={"image": 1, "video": 0},
    )  # fmt: skip
    engines: list[AsyncLLM] = []

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        engines.append(AsyncLLM.from_engine_args(told))
        yield
        engines[0].shutdown()

    app = FastAPI(lifespan=lifespan)
    sampling = SamplingParams(temperature=0, max_tokens=tokens, output_kind=RequestOutputKind.FINAL_ONLY)

    @app.get("/ready")
    def ready() -> bool:
        return True

    @app.post("/run")
    async def run(data: bytes = Body(media_type="application/octet-stream")) -> dict[str, object]:
        image = await asyncio.to_thread(lambda: Image.open(io.BytesIO(data)).convert("RGB"))
        asked = {"prompt": text, "multi_modal_data": {"image": image}}
        made = [part async for part in engines[0].generate(asked, sampling, uuid.uuid4().hex)][-1].outputs[0]
        return {"text": made.text.strip(), "tokens": len(made.token_ids)}

    return app


if __name__ == "__main__":
    uvicorn.run(build(sys.argv[1], int(sys.argv[2])), port=int(sys.argv[3]), log_level="warning")
