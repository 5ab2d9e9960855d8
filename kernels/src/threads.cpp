#include "dispatch.hpp"
#include "tbb/global_control.h"
#include "tbb/task_arena.h"

extern "C" {

EDGERT_EXPORT void edgert_kernels_with_threads(int threads, void (*task)()) {
    // An arena gets no more workers than TBB may have in total, by default one for each core.
    const tbb::global_control allowed(tbb::global_control::max_allowed_parallelism, static_cast<std::size_t>(threads));
    tbb::task_arena(threads).execute(task);
}
}
