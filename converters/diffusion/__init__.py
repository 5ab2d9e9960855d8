"""Diffusion transformers become bundles.

families.py     what each kind of transformer takes and gives
transformer.py  load, export, and compare with diffusers
build.py        the bundle
"""
