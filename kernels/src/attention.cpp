#include "attention.hpp"

#include <algorithm>
#include <atomic>
#include <memory>
#include <mutex>
#include <vector>

#include "parallel.hpp"

namespace edgert {

namespace {

constexpr std::size_t kBlock = CacheLayout::kTokens;
constexpr std::size_t kMinSpan = 512;       // tokens: below, joining results costs more than a thread gains
constexpr std::size_t kSerialWork = 1 << 18;  // multiplications that one thread does sooner than several

// What one call keeps until it ends. A thread that waits for its tasks may be given those of another call, so these
// cannot belong to threads.
struct Buffers {
    std::vector<VisibleRange> mask;
    std::vector<float> results;
    std::unique_ptr<std::atomic<std::size_t>[]> left;
    std::size_t left_size = 0;

    std::atomic<std::size_t>* counters(std::size_t count, std::size_t value) {
        if (left_size < count) {
            left = std::make_unique<std::atomic<std::size_t>[]>(count);
            left_size = count;
        }
        for (std::size_t i = 0; i < count; ++i)
            left[i].store(value, std::memory_order_relaxed);
        return left.get();
    }
};

class BufferLease {
public:
    BufferLease() {
        const std::lock_guard<std::mutex> lock(mutex());
        if (!spare().empty()) {
            m_buffers = std::move(spare().back());
            spare().pop_back();
        } else {
            m_buffers = std::make_unique<Buffers>();
        }
    }
    ~BufferLease() {
        const std::lock_guard<std::mutex> lock(mutex());
        spare().push_back(std::move(m_buffers));
    }
    BufferLease(const BufferLease&) = delete;
    BufferLease& operator=(const BufferLease&) = delete;
    Buffers* operator->() const { return m_buffers.get(); }

private:
    static std::mutex& mutex() {
        static std::mutex instance;
        return instance;
    }
    static std::vector<std::unique_ptr<Buffers>>& spare() {
        static std::vector<std::unique_ptr<Buffers>> instance;
        return instance;
    }
    std::unique_ptr<Buffers> m_buffers;
};

template <class T>
T* room(std::vector<T>& buffer, std::size_t size) {
    if (buffer.size() < size)
        buffer.resize(size);
    return buffer.data();
}

// Of this thread, while it runs one task: attention_scratch() and a tile's results.
float* thread_scratch(const CacheLayout& layout) {
    static thread_local std::vector<float> scratch;
    return room(scratch, attention_scratch(layout) + kTileRows * result_stride(layout));
}

template <class Task>
void run(std::size_t count, bool serial, const Task& task) {
    if (serial) {
        for (std::size_t i = 0; i < count; ++i)
            task(i);
    } else {
        parallel_for(static_cast<std::int64_t>(count), [&](std::int64_t i) { task(static_cast<std::size_t>(i)); });
    }
}

}  // namespace

void cached_attention(const AttentionCall& call, const AttentionKernels& kernels) {
    const BufferLease buffers;

    // First the cache takes the new tokens, and the mask is looked through.
    const auto first_block = call.past / kBlock;
    const auto appends = ((call.total() - 1) / kBlock - first_block + 1) * call.kv_heads;
    const bool masked = call.mask != nullptr || call.visible != nullptr;
    const auto mask_rows = masked ? call.mask_heads * call.mask_rows : 0;
    auto* const mask = masked ? room(buffers->mask, mask_rows) : nullptr;
    const auto small = call.tokens * call.width() + mask_rows * call.total() <= kSerialWork / 4;
    run(appends + mask_rows, small, [&](std::size_t i) {
        if (i < appends)
            kernels.append(call, first_block + i / call.kv_heads, i % call.kv_heads, thread_scratch(call.layout));
        else
            mask[i - appends] = kernels.scan(call, i - appends);
    });

    std::size_t begin = 0;
    auto end = call.total();
    if (masked) {
        begin = end;
        end = 0;
        for (std::size_t i = 0; i < mask_rows; ++i) {
            begin = mask[i].begin < mask[i].end ? std::min(begin, mask[i].begin) : begin;
            end = std::max(end, mask[i].end);
        }
        begin = std::min(begin, end) / kBlock * kBlock;
    }

    // Then every unit by itself; of the spans of one tile, the last to end joins them all.
    const auto rows = call.tokens * call.group();
    const auto row_tiles = (rows + kTileRows - 1) / kTileRows;
    const auto tiles = row_tiles * call.kv_heads;
    const auto length = end - begin;
    const auto wanted = std::max<std::size_t>(1, std::min(length / kMinSpan, kMaxSpans / tiles));
    const auto span = std::max(kBlock, ((length + wanted - 1) / wanted + kBlock - 1) / kBlock * kBlock);
    const auto spans = std::max<std::size_t>(1, (length + span - 1) / span);
    const auto tile_results = kTileRows * result_stride(call.layout);
    auto* const results = spans > 1 ? room(buffers->results, tiles * spans * tile_results) : nullptr;
    auto* const left = spans > 1 ? buffers->counters(tiles, spans) : nullptr;
    // One head after another, whose keys and values then stay in a core's own cache; of a head the longest first, which
    // under a causal mask are those of the last tokens.
    std::atomic<std::size_t> next{0};
    const auto work = rows * call.kv_heads * length * (call.layout.head_dim + call.layout.value_dim);
    run(tiles * spans, work <= kSerialWork, [&](std::size_t) {
        const auto i = next.fetch_add(1, std::memory_order_relaxed);
        const auto tile = i / spans;
        AttentionUnit unit{};
        unit.kv_head = tile / row_tiles;
        unit.first = (row_tiles - 1 - tile % row_tiles) * kTileRows;
        unit.rows = std::min(kTileRows, rows - unit.first);
        unit.begin = begin + i % spans * span;
        unit.end = std::min(end, unit.begin + span);
        auto* const scratch = thread_scratch(call.layout);
        if (spans == 1) {
            auto* const result = scratch + attention_scratch(call.layout);
            kernels.attend(call, mask, unit, scratch, result);
            kernels.finish(call, unit, result, 1);
            return;
        }
        auto* const tile_begin = results + tile * spans * tile_results;
        kernels.attend(call, mask, unit, scratch, tile_begin + i % spans * unit.rows * result_stride(call.layout));
        if (left[tile].fetch_sub(1, std::memory_order_acq_rel) == 1)
            kernels.finish(call, unit, tile_begin, spans);
    });
}

}  // namespace edgert
