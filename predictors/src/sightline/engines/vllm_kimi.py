"""vLLM's Kimi-VL with our own processor in place of the checkpoint's remote code; imported by vLLM's processes only.

vLLM asks a processor at start how many tokens an image may have; the images of requests come from us, as patches.
"""

# pyright: reportMissingImports=false, reportUntypedBaseClass=false, reportUntypedClassDecorator=false
# pyright: reportUnknownParameterType=false

from collections.abc import Mapping, Sequence
from typing import Any

from vllm.model_executor.models.kimi_vl import (
    KimiVLDummyInputsBuilder,
    KimiVLForConditionalGeneration,
    KimiVLMultiModalProcessor,
    KimiVLProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.processing import PromptReplacement

from sightline.models.kimi_vl import register

register()  # so that AutoProcessor, which vLLM asks, finds ours


class Processor(KimiVLMultiModalProcessor):
    """Our sizes are (frames, height, width) in patches; vLLM's are without frames."""

    def _postprocess_hf_mm_data(self, *arguments: Any) -> Any:  # noqa: ANN401
        data = super()._postprocess_hf_mm_data(*arguments)
        if "image_grid_thw" in data:
            data["image_grid_hws"] = data.pop("image_grid_thw")[:, 1:]
        return data

    def _get_prompt_updates(
        self,
        mm_items: Any,  # noqa: ANN401
        hf_processor_mm_kwargs: Mapping[str, Any],
        out_mm_kwargs: Any,  # noqa: ANN401
    ) -> Sequence[Any]:
        token = self.info.image_token_id
        height, width = self.info.get_hf_config().vision_config.merge_kernel_size

        def replacement(index: int) -> list[int]:
            grid = out_mm_kwargs["image"][index]["image_grid_hws"].data
            return [token] * (int(grid.prod()) // (height * width))

        return [PromptReplacement(modality="image", target=[token], replacement=replacement)]


@MULTIMODAL_REGISTRY.register_processor(Processor, info=KimiVLProcessingInfo, dummy_inputs=KimiVLDummyInputsBuilder)
class KimiVL(KimiVLForConditionalGeneration):
    """As vLLM has it."""
