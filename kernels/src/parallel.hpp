// Work for all threads that OpenVINO gave to the inference.

#pragma once

#include <cstdint>

#include "tbb/parallel_for.h"
#include "tbb/task_arena.h"

namespace edgert {

// Calls task(i) for i in [0, count), each exactly once, in any order and on any thread of the arena that the CPU plugin
// runs its graph in. Tasks must not depend on which thread they run on: results are the same for every thread count.
template <class Task>
void parallel_for(std::int64_t count, const Task& task) {
    if (count == 1) {
        task(std::int64_t{0});
        return;
    }
    // Isolated: a thread that waits here for the others must not begin another request's work, which uses the same
    // thread-local buffers. simple_partitioner: how large a piece of work is, the caller knows better than a heuristic.
    tbb::this_task_arena::isolate([&] {
        tbb::parallel_for(
            tbb::blocked_range<std::int64_t>(0, count, 1),
            [&](const tbb::blocked_range<std::int64_t>& range) {
                for (auto i = range.begin(); i < range.end(); ++i)
                    task(i);
            },
            tbb::simple_partitioner());
    });
}

inline std::int64_t thread_count() {
    return tbb::this_task_arena::max_concurrency();
}

}  // namespace edgert
