"""The image processors and feature extractors of transformers that edgert's preprocessing is compared with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from transformers import Gemma4AudioFeatureExtractor, WhisperFeatureExtractor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.phi4_multimodal.feature_extraction_phi4_multimodal import Phi4MultimodalFeatureExtractor
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from edgert.media import AudioSpec, ImageSpec

Pixels = NDArray[np.float32]


@dataclass(frozen=True)
class Pictures:
    """A processor of transformers, the spec for the size that it picks, and its pixels put back in order.

    Attributes:
        process: the processor's output for a picture, with arrays.
        spec: what edgert does; height and width are replaced by those of `upright`.
        upright: of that output the values of the pixels, [3, height, width].
    """

    process: Callable[[Image.Image], dict[str, Any]]
    spec: ImageSpec
    upright: Callable[[dict[str, Any]], Pixels]

    def both(self, pixels: NDArray[np.uint8]) -> tuple[Pixels, ImageSpec]:
        """What transformers makes of a picture, and the spec for the same size."""
        values = self.upright(self.process(Image.fromarray(pixels)))
        return values, replace(self.spec, height=values.shape[1], width=values.shape[2])


def _whole(output: dict[str, Any]) -> Pixels:
    return np.asarray(output["pixel_values"]).reshape(-1, 3, *np.shape(output["pixel_values"])[-2:])[0]


def _qwen(output: dict[str, Any]) -> Pixels:
    """Patches of two equal frames, four neighbours after one another."""
    _, rows, columns = output["image_grid_thw"][0]
    patches = output["pixel_values"].reshape(rows // 2, columns // 2, 2, 2, 3, 2, 14, 14)
    assert (patches[..., 0, :, :] == patches[..., 1, :, :]).all()
    return patches[..., 0, :, :].transpose(4, 0, 2, 5, 1, 3, 6).reshape(3, rows * 14, columns * 14)


def _naflex(patches: Pixels, rows: int, columns: int) -> Pixels:
    """Patches row by row, the channels of a pixel beside one another, then empty ones."""
    used = patches[: rows * columns].reshape(rows, columns, 16, 16, 3)
    return used.transpose(4, 0, 2, 1, 3).reshape(3, rows * 16, columns * 16)


def _siglip2(output: dict[str, Any]) -> Pixels:
    return _naflex(output["pixel_values"][0], *output["spatial_shapes"][0])


def _gemma4(output: dict[str, Any]) -> Pixels:
    columns, rows = output["image_position_ids"][0].max(axis=0) + 1
    return _naflex(output["pixel_values"][0], rows, columns)


def _pictures(processor: Any, upright: Callable[[dict[str, Any]], Pixels] = _whole, **spec: Any) -> Pictures:
    plain = ImageSpec(tower="vision", placeholder=1, expansion=(2,), token=2, height=1, width=1)
    described = replace(
        plain,
        resample=processor.resample.name.lower(),
        scale=processor.rescale_factor,
        mean=tuple(processor.image_mean) if processor.do_normalize else (0.0, 0.0, 0.0),
        std=tuple(processor.image_std) if processor.do_normalize else (1.0, 1.0, 1.0),
        **spec,
    )
    return Pictures(lambda picture: processor(picture, return_tensors="np"), described, upright)


PICTURES = {
    "siglip": _pictures(SiglipImageProcessorPil()),
    "clip": _pictures(CLIPImageProcessorPil(), fit="crop"),
    "llava": _pictures(LlavaImageProcessorPil(size={"shortest_edge": 336}, crop_size=336), fit="crop"),
    "gemma3": _pictures(Gemma3ImageProcessorPil(size={"height": 896, "width": 896})),
    "gemma4": _pictures(Gemma4ImageProcessorPil(), _gemma4),
    "qwen2_vl": _pictures(Qwen2VLImageProcessorPil(), _qwen),
    "pixtral": _pictures(PixtralImageProcessorPil()),
    "siglip2": _pictures(Siglip2ImageProcessorPil(), _siglip2),
    "idefics3": _pictures(Idefics3ImageProcessorPil(do_image_splitting=False), longest_edge=4 * 364),
    "smolvlm": _pictures(SmolVLMImageProcessorPil(do_image_splitting=False), longest_edge=4 * 364),
}


@dataclass(frozen=True)
class Sounds:
    """A feature extractor of transformers, and the spec that says the same.

    Attributes:
        process: features [mels, frames] of samples, and how many of the frames are of the sound.
    """

    process: Callable[[NDArray[np.float32]], tuple[Pixels, int]]
    spec: AudioSpec


def _whisper(mels: int, torch: bool = False) -> Callable[[NDArray[np.float32]], tuple[Pixels, int]]:
    extractor = WhisperFeatureExtractor(feature_size=mels)
    if not torch:  # what it computes where torch is not installed
        extractor._torch_extract_fbank_features = extractor._np_extract_fbank_features

    def process(samples: NDArray[np.float32]) -> tuple[Pixels, int]:
        output = extractor(samples, sampling_rate=16_000, return_tensors="np", return_attention_mask=True)
        return output["input_features"][0], int(output["attention_mask"].sum())

    return process


def _phi4(samples: NDArray[np.float32]) -> tuple[Pixels, int]:
    features = Phi4MultimodalFeatureExtractor()(samples, sampling_rate=16_000)["audio_input_features"][0].numpy()
    return features.T, len(features)


def _usm(extractor: Any) -> Callable[[NDArray[np.float32]], tuple[Pixels, int]]:
    def process(samples: NDArray[np.float32]) -> tuple[Pixels, int]:
        output = extractor([samples], return_tensors="np")
        return output["input_features"][0].T, int(output["input_features_mask"].sum())

    return process


def _audio(kind: str, **settings: Any) -> AudioSpec:
    return AudioSpec(tower="audio", placeholder=1, token=2, kind=kind, **settings)  # type: ignore[arg-type]


_HALVED_TWICE = ((3, 2, 1), (3, 2, 1))
_WHISPER = _audio("whisper", frames=3000, subsampling=((3, 1, 1), (3, 2, 1)))
SOUNDS = {
    "whisper": Sounds(_whisper(80), _WHISPER),
    "whisper with torch": Sounds(_whisper(80, torch=True), _WHISPER),
    "qwen2_audio": Sounds(_whisper(128), _audio("whisper", mels=128, frames=3000, subsampling=((3, 2, 1), (2, 2, 0)))),
    "phi4_multimodal": Sounds(
        _phi4,
        _audio(
            "phi4", n_fft=512, preemphasis=0.97, max_frequency=7690.0, floor=1.0, frames=400,
            subsampling=((3, 2, 1), (3, 2, 1), (3, 2, 1)),
        ),
    ),
    "gemma4": Sounds(
        _usm(Gemma4AudioFeatureExtractor()),
        _audio("gemma4", mels=128, n_fft=512, window=320, floor=1e-3, frames=400, subsampling=_HALVED_TWICE),
    ),
    "gemma4, all settings": Sounds(
        _usm(Gemma4AudioFeatureExtractor(
            preemphasis=0.97, min_frequency=125.0, max_frequency=7600.0, frame_length_ms=32.0, fft_overdrive=True,
            per_bin_mean=[1.0] * 128, per_bin_stddev=[2.0] * 128,
        )),
        _audio(
            "gemma4", mels=128, n_fft=1024, window=512, preemphasis=0.97, min_frequency=125.0, max_frequency=7600.0,
            floor=1e-3, frames=400, band_mean=(1.0,) * 128, band_std=(2.0,) * 128, subsampling=_HALVED_TWICE,
        ),
    ),
}  # fmt: skip
