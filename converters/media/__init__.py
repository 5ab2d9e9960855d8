"""Vision-language and audio models of transformers: towers, and decoders that take what towers say.

inputs.py     the inputs that such a decoder has beside tokens
families.py   what a family's configuration does not tell: one line each
folders.py    what a folder's files say about tokens and processors
pictures.py   what becomes of a picture: from the folder's preprocessor configuration to `ImageSpec`
sounds.py     the same for sound
towers.py     a tower and its projector as one model of static shapes
check.py      the gate: towers, and the whole model with a picture or a sound, against transformers
compiling.py  from a loaded model to towers, decoder, `MediaSpec` and the rows of the report
bundling.py   towers and `media.json` in a bundle
"""
