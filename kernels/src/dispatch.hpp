// One table of kernels for each instruction set, and which of them this processor gets.

#pragma once

#include <cstdint>

#include "attention.hpp"
#include "linear.hpp"

namespace edgert {

struct Kernels {
    const char* name;
    std::int64_t rows;  // of a full tile of activations
    void (*quantize_tile)(const Weights&, const Activations&, const Norm&, std::int64_t tile, const float* data,
                          float* scratch);
    void (*multiply_blocks)(const Weights&, const Activations&, const Epilogue&, std::int64_t tile_begin,
                            std::int64_t tile_end, std::int64_t begin, std::int64_t end);
    const AttentionKernels* attention;
};

// The best that processor and operating system support, at most what the environment variable EDGERT_KERNELS_MAX_ISA
// names: scalar, avx2, avx2-vnni, avx512-vnni or amx-int8. Throws ov::Exception where it names something else.
const Kernels& kernels();

}  // namespace edgert

#ifdef _WIN32
#define EDGERT_EXPORT __declspec(dllexport)
#else
#define EDGERT_EXPORT __attribute__((visibility("default")))
#endif

extern "C" {
// What is used now, for diagnosis; null where EDGERT_KERNELS_MAX_ISA is no name. Null where the environment variable names something else.
EDGERT_EXPORT const char* edgert_kernels_isa();
// Use the best up to `limit` from now on; for tests and benchmarks, while nothing runs. Null where that is no name.
EDGERT_EXPORT const char* edgert_kernels_limit_isa(const char* limit);
// Runs `task` where work is divided among this many threads, also if that is more than there are cores; for tests.
EDGERT_EXPORT void edgert_kernels_with_threads(int threads, void (*task)());
}
