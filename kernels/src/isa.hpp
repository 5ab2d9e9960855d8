// What every isa_*.cpp does with its instruction set.

#pragma once

#include "attention_kernels.hpp"
#include "dispatch.hpp"
#include "linear_kernels.hpp"

namespace edgert {
namespace {

template <class S>
constexpr Kernels make_kernels(const char* name) {
    return {name, S::kRows, quantize_tile<S>, multiply_blocks<S>, attention_kernels<S>()};
}

}  // namespace
}  // namespace edgert
