"""Images and sound on their way into a language model, with NumPy and Pillow alone."""

from edgert.media.audio import prepare_audio, read_audio
from edgert.media.dataurl import decode_data_url
from edgert.media.images import prepare_image, read_image
from edgert.media.spec import AudioSpec, ImageSpec, MediaSpec, read

__all__ = [
    "AudioSpec",
    "ImageSpec",
    "MediaSpec",
    "decode_data_url",
    "prepare_audio",
    "prepare_image",
    "read",
    "read_audio",
    "read_image",
]
