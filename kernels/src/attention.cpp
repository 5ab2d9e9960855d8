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
constexpr std::size_t kSerialWork = 1 << 18;  // multiplications that one thread does sooner than several
constexpr std::size_t kUnitsPerThread = 8;    // so that no thread waits long for the last one
constexpr std::size_t kMaxResults = 1 << 22;  // floats kept for spans of one sequence that are joined later

// How one call is divided.
struct Division {
    std::size_t first_append;  // counted through all calls, as are units, results and counters
    std::size_t first_unit;
    std::size_t first_result;
    std::size_t first_counter;
    std::size_t begin;  // tokens that some row sees
    std::size_t end;
    std::size_t row_tiles;
    std::size_t spans;       // of a unit
    std::size_t tile_units;  // of each tile: more than one, and the last to end joins them

    std::size_t tiles(const AttentionCall& call) const { return row_tiles * call.kv_heads; }
    std::size_t tile_results(const AttentionCall& call) const {
        const auto rows = std::min(kTileRows, call.tokens * call.group());
        return span_count(begin, end) * rows * result_stride(call.layout);
    }
};

// What one call keeps until it ends. A thread that waits for its tasks may be given those of another call, so these
// cannot belong to threads.
struct Buffers {
    std::vector<Division> divisions;
    std::vector<VisibleRange> mask;
    std::vector<float> results;
    std::unique_ptr<std::atomic<std::size_t>[]> left;
    std::size_t left_size = 0;

    std::atomic<std::size_t>* counters(std::size_t count) {
        if (left_size < count) {
            left = std::make_unique<std::atomic<std::size_t>[]>(count);
            left_size = count;
        }
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

std::size_t appends(const AttentionCall& call) {
    return ((call.total() - 1) / kBlock - call.past / kBlock + 1) * call.kv_heads;
}

// Which of the calls a number belongs to, counted from where each begins.
const Division& of(const std::vector<Division>& divisions, std::size_t Division::*first, std::size_t number) {
    const auto after = std::upper_bound(divisions.begin(), divisions.end(), number,
                                        [&](std::size_t i, const Division& each) { return i < each.*first; });
    return *(after - 1);
}

}  // namespace

void cached_attention(const AttentionCall* calls, std::size_t count, const AttentionKernels& kernels) {
    if (count == 0)
        return;
    const BufferLease buffers;
    auto& divisions = buffers->divisions;
    divisions.clear();

    // First the caches take the new tokens, and the mask is looked through.
    std::size_t append_count = 0;
    std::size_t copied = 0;
    for (std::size_t c = 0; c < count; ++c) {
        divisions.push_back({append_count, 0, 0, 0, 0, calls[c].total(), 0, 0, 0});
        append_count += appends(calls[c]);
        copied += calls[c].tokens * calls[c].width();
    }
    const auto& one = calls[0];
    const bool masked = one.mask != nullptr || one.visible != nullptr;
    const auto mask_rows = masked ? one.mask_heads * one.mask_rows : 0;
    auto* const mask = masked ? room(buffers->mask, mask_rows) : nullptr;
    const auto small = copied + mask_rows * one.total() <= kSerialWork / 4;
    run(append_count + mask_rows, small, [&](std::size_t i) {
        if (i < append_count) {
            const auto& division = of(divisions, &Division::first_append, i);
            const auto& call = calls[&division - divisions.data()];
            const auto own = i - division.first_append;
            kernels.append(call, call.past / kBlock + own / call.kv_heads, own % call.kv_heads, thread_scratch(call.layout));
        } else {
            mask[i - append_count] = kernels.scan(one, i - append_count);
        }
    });
    if (masked) {
        auto& sees = divisions[0];
        sees.begin = sees.end;
        sees.end = 0;
        for (std::size_t i = 0; i < mask_rows; ++i) {
            sees.begin = mask[i].begin < mask[i].end ? std::min(sees.begin, mask[i].begin) : sees.begin;
            sees.end = std::max(sees.end, mask[i].end);
        }
        sees.begin = std::min(sees.begin, sees.end) / kBlock * kBlock;
    }

    // Then every unit by itself. A tile is one unit where there are enough of them for all threads.
    std::size_t tiles = 0;
    std::size_t work = 0;
    for (std::size_t c = 0; c < count; ++c) {
        const auto rows = calls[c].tokens * calls[c].group();
        divisions[c].row_tiles = (rows + kTileRows - 1) / kTileRows;
        tiles += divisions[c].tiles(calls[c]);
        work += rows * calls[c].kv_heads * (divisions[c].end - divisions[c].begin) *
                (calls[c].layout.head_dim + calls[c].layout.value_dim);
    }
    const auto serial = work <= kSerialWork;
    const auto threads = serial ? 1 : static_cast<std::size_t>(thread_count());
    const auto wanted = threads == 1 ? 1 : std::max<std::size_t>(1, kUnitsPerThread * threads / tiles);  // of a tile
    std::size_t unit_count = 0;
    std::size_t result_count = 0;
    std::size_t counter_count = 0;
    for (std::size_t c = 0; c < count; ++c) {
        auto& division = divisions[c];
        const auto spans = span_count(division.begin, division.end);
        const auto own_results = division.tiles(calls[c]) * division.tile_results(calls[c]);
        division.spans = own_results <= kMaxResults ? (spans + wanted - 1) / wanted : spans;
        division.tile_units = (spans + division.spans - 1) / division.spans;
        division.first_unit = unit_count;
        division.first_result = result_count;
        division.first_counter = counter_count;
        unit_count += division.tiles(calls[c]) * division.tile_units;
        if (division.tile_units > 1) {
            result_count += own_results;
            counter_count += division.tiles(calls[c]);
        }
    }
    auto* const results = room(buffers->results, result_count);
    auto* const left = buffers->counters(counter_count);
    for (std::size_t c = 0; c < count; ++c)
        for (std::size_t i = 0; divisions[c].tile_units > 1 && i < divisions[c].tiles(calls[c]); ++i)
            left[divisions[c].first_counter + i].store(divisions[c].tile_units, std::memory_order_relaxed);

    // One head after another, whose keys and values then stay in a core's own cache; of a head the longest first, which
    // under a causal mask are those of the last tokens.
    std::atomic<std::size_t> next{0};
    run(unit_count, serial, [&](std::size_t) {
        const auto number = next.fetch_add(1, std::memory_order_relaxed);
        const auto& division = of(divisions, &Division::first_unit, number);
        const auto& call = calls[&division - divisions.data()];
        const auto tile = (number - division.first_unit) / division.tile_units;
        const auto part = (number - division.first_unit) % division.tile_units;
        const auto rows = call.tokens * call.group();
        AttentionUnit unit{};
        unit.kv_head = tile / division.row_tiles;
        unit.first = (division.row_tiles - 1 - tile % division.row_tiles) * kTileRows;
        unit.rows = std::min(kTileRows, rows - unit.first);
        unit.begin = division.begin + part * division.spans * kSpanTokens;
        unit.end = std::min(division.end, unit.begin + division.spans * kSpanTokens);
        unit.apart = division.tile_units > 1;
        auto* const scratch = thread_scratch(call.layout);
        if (!unit.apart) {
            if (call.causal)  // later ones no row of the tile sees
                unit.end = std::min(unit.end, call.past + (unit.first + unit.rows - 1) / call.group() + 1);
            auto* const result = scratch + attention_scratch(call.layout);
            kernels.attend(call, mask, unit, scratch, result);
            kernels.finish(call, unit, result, 1);
            return;
        }
        auto* const tile_results = results + division.first_result + tile * division.tile_results(call);
        kernels.attend(call, mask, unit, scratch,
                       tile_results + part * division.spans * unit.rows * result_stride(call.layout));
        if (left[division.first_counter + tile].fetch_sub(1, std::memory_order_acq_rel) == 1)
            kernels.finish(call, unit, tile_results, span_count(division.begin, division.end));
    });
}

}  // namespace edgert
