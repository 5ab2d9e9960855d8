"""What QuantizedLinear computes, in numpy from its description: roundings and all, and what it stands for, in f64.

The order of roundings is part of the definition (steps of 32 columns are summed as integers; steps, and then groups of
weights, are joined in f32, in order, by fused multiply-add), so all but the activations of a gate can be compared
to the last bit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from kernel_ops import LANES, Array, Matrix

F32 = np.float32
EPS = 2.0**-24  # of a rounding to f32
STEP = 32  # columns of activations that share a scale
TINY = F32(1e-36)  # below, a step of activations is zero


def fma(a: Array, b: Array, c: Array) -> Array:
    """a * b + c in f32 with one rounding.

    The product is exact in f64; the sum is rounded to odd there, after which rounding to f32 is as if it were the first
    (Boldo and Melquiond, "Emulation of FMA and correctly rounded sums: proved algorithms using rounding to odd", 2008).
    """
    with np.errstate(over="ignore", invalid="ignore"):
        product = a.astype(np.float64) * b.astype(np.float64)
        wide = c.astype(np.float64)
        total = product + wide
        part = total - product
        error = (product - (total - part)) + (wide - part)
        even = (total.view(np.int64) & 1) == 0
        odd = np.nextafter(total, np.where(error > 0, np.inf, -np.inf))
        return np.where((error != 0) & np.isfinite(error) & even, odd, total).astype(F32)


def rms_norm(x: Array, weight: Array, epsilon: float) -> Array:
    """f32 `[M, K]`: squares are summed in 16 lanes, then halves onto each other."""
    lanes = np.zeros((x.shape[0], LANES), F32)
    padded = np.pad(x, ((0, 0), (0, -x.shape[1] % LANES)))
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        for k in range(0, padded.shape[1], LANES):
            lanes = fma(padded[:, k : k + LANES], padded[:, k : k + LANES], lanes)
        while lanes.shape[1] > 1:
            half = lanes.shape[1] // 2
            lanes = lanes[:, :half] + lanes[:, half:]
        factor = F32(1) / np.sqrt(lanes / F32(x.shape[1]) + F32(epsilon))
        return x * factor * weight


def quantized(x: Array) -> tuple[Array, Array]:
    """One step `[M, columns]`: codes i64 and scales f32 `[M, 1]`, NaN where a row has something that is not finite."""
    largest = np.abs(x).max(axis=1, keepdims=True)
    finite = np.isfinite(largest)
    used = finite & (largest >= TINY)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        inverse = np.where(used, F32(127) / largest, F32(0)).astype(F32)
        codes = np.rint(np.where(finite, x, F32(0)) * inverse).astype(np.int64)
    return codes, np.where(used, largest / F32(127), np.where(finite, F32(0), F32(np.nan)))


def product(x: Array, matrix: Matrix) -> Array:
    """f32 `[M, N]` of f32 `[M, K]`: of each group the codes' share, less that of the zero point."""
    out = np.zeros((x.shape[0], matrix.rows), F32)
    weights = matrix.codes.astype(np.float64)  # BLAS, and exact: sums stay below 2^53
    for group in range(matrix.scales.shape[1]):
        total, rows = np.zeros_like(out), np.zeros((x.shape[0], 1), F32)
        end = (group + 1) * matrix.group
        for begin in range(group * matrix.group, end, STEP):
            columns = slice(begin, min(begin + STEP, end))
            codes, scales = quantized(x[:, columns])
            total = fma((codes.astype(np.float64) @ weights[:, columns].T).astype(F32), scales, total)
            rows = fma(codes.sum(axis=1, keepdims=True).astype(F32), scales, rows)
        scale = matrix.scales[:, group].astype(F32)
        out = fma(total, scale, out)
        out = fma(scale * -matrix.zeros[:, group].astype(F32), rows, out)
    return out


def product_size(x: Array, matrix: Matrix, scaled: bool = True) -> Array:
    """Of what is summed: codes and the zero points' share, whose difference may be much smaller."""
    codes = matrix.codes + matrix.zeros.astype(np.float64).repeat(matrix.group, axis=1)
    if scaled:
        codes *= np.abs(matrix.scales.astype(np.float64)).repeat(matrix.group, axis=1)
    return np.abs(x.astype(np.float64)) @ codes.T


def in_range(x: Array, matrix: Matrix) -> Array:
    """Where no sum leaves f32 on the way: those of codes and activations come before the weights' scales."""
    return (product_size(x, matrix) < 1e38) & (product_size(x, matrix, scaled=False) < 1e38)


def product_bound(x: Array, matrix: Matrix) -> Array:
    """How far `product` may be from W . x: half a code of each activation, and the roundings of f32."""
    weights = np.abs(matrix.weights())
    lost = np.zeros((x.shape[0], matrix.rows))
    wide = np.abs(x.astype(np.float64))
    for begin in range(0, matrix.columns, STEP):
        columns = slice(begin, begin + STEP)
        largest = wide[:, columns].max(axis=1, keepdims=True)
        half = np.where(largest >= TINY, 0.5001 * largest / 127, largest)
        lost += half * weights[:, columns].sum(axis=1)
    steps = -(-matrix.columns // STEP)
    roundings = (steps + 2 * matrix.scales.shape[1] + 4) * EPS
    return lost * (1 + roundings) + 1.01 * roundings * product_size(x, matrix) + steps * 1e-37


def activation(name: str, x: Array) -> Array:
    """In f64."""
    with np.errstate(over="ignore"):
        if name == "silu":
            return x / (1 + np.exp(-x))
        if name == "gelu":
            return 0.5 * x * np.vectorize(math.erfc, otypes=[np.float64])(-x / math.sqrt(2))
        if name == "gelu_tanh":
            inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
            return x / (1 + np.exp(-2 * inner))
    return x


def activation_bound(name: str, x: Array) -> Array:
    """How far the kernels' f32 may be from `activation`."""
    if not name:
        return np.zeros_like(x)
    # e^x is clamped to where it is a normal number, and erf is a formula with an absolute error of 1.5e-7.
    lost = np.abs(x) * (1.2e-38 if name != "gelu" else 1e-7)
    # A rounding of the exponent counts by its size; only that of gelu_tanh is computed.
    exponent = np.minimum(np.abs(1.6 * x + 0.0714 * x**3), 90) if name == "gelu_tanh" else 0.0
    return (1.5e-6 + 4 * EPS * exponent) * np.abs(activation(name, x)) + lost + 1e-37


@dataclass(frozen=True)
class Linear:
    """A QuantizedLinear: attributes, and the constant inputs."""

    matrix: Matrix
    up: Matrix | None = None  # then `matrix` is the gate
    norm: Array | None = None
    epsilon: float = 1e-6
    activation: str = ""
    bias: Array | None = None

    def attributes(self, residual: bool) -> dict[str, Any]:
        return {
            **self.matrix.attributes(),
            "norm": "" if self.norm is None else "rms",
            "epsilon": self.epsilon,
            "gated": self.up is not None,
            "activation": self.activation,
            "bias": self.bias is not None,
            "residual": residual,
        }

    def normed(self, x: Array) -> Array:
        return x if self.norm is None else rms_norm(x, self.norm, self.epsilon)

    def epilogue(self, out: Array, residual: Array | None) -> Array:
        """f32, in the order of the kernels."""
        with np.errstate(over="ignore", invalid="ignore"):
            out = out if self.bias is None else out + self.bias
            return out if residual is None else out + residual
