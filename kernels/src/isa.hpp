// What every isa_*.cpp does with its instruction set.

#pragma once

#include "dispatch.hpp"
#include "linear_kernels.hpp"

namespace edgert {
namespace {

template <class S>
constexpr Kernels make_kernels(const char* name, const AttentionKernels& attention) {
    return {name, S::kRows, quantize_tile<S>, multiply_blocks<S>, &attention};
}

}  // namespace
}  // namespace edgert
