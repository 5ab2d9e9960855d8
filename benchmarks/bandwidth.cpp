// How fast THREADS threads together read memory: prints GB/s, one line a repetition.
//
//     bandwidth THREADS REPETITIONS
//
// Each thread sums up its own part of 512 MiB, in one stream or in four: which is faster differs from CPU to CPU, so
// the better of the two counts. The sums keep the compiler from leaving the reads out; it makes vectors of them.
#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

namespace {

constexpr std::size_t kWords = (std::size_t{512} << 20) / sizeof(std::uint64_t);
constexpr std::size_t kLine = 8;  // words of a cache line

template <std::size_t Streams>
std::uint64_t sum(const std::uint64_t* words, std::size_t count) {
    std::uint64_t sums[Streams * kLine] = {};
    const std::size_t part = count / Streams / kLine * kLine;
    for (std::size_t i = 0; i < part; i += kLine) {
        for (std::size_t s = 0; s < Streams; ++s) {
            for (std::size_t j = 0; j < kLine; ++j) sums[s * kLine + j] += words[s * part + i + j];
        }
    }
    std::uint64_t total = 0;
    for (std::uint64_t value : sums) total += value;
    return total;
}

double gigabytes_per_second(const std::vector<std::uint64_t>& words, std::size_t threads,
                            std::uint64_t (*sum_part)(const std::uint64_t*, std::size_t)) {
    std::vector<std::uint64_t> sums(threads * kLine);
    std::vector<std::thread> running;
    const std::size_t part = words.size() / threads;
    const auto start = std::chrono::steady_clock::now();
    for (std::size_t t = 0; t < threads; ++t) {
        running.emplace_back([&, t] { sums[t * kLine] = sum_part(words.data() + t * part, part); });
    }
    for (std::thread& thread : running) thread.join();
    const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
    for (std::size_t t = 0; t < threads; ++t) {
        if (sums[t * kLine] == 0) std::abort();  // the words are ones
    }
    return static_cast<double>(words.size() * sizeof(std::uint64_t)) / took.count() / 1e9;
}

}  // namespace

int main(int count, char** arguments) {
    if (count != 3) return 2;
    const auto threads = static_cast<std::size_t>(std::max(1, std::atoi(arguments[1])));
    const int repetitions = std::max(1, std::atoi(arguments[2]));
    const std::vector<std::uint64_t> words(kWords, 1);
    for (int i = 0; i < repetitions; ++i) {
        const double one = gigabytes_per_second(words, threads, sum<1>);
        const double four = gigabytes_per_second(words, threads, sum<4>);
        std::printf("%.2f\n", std::max(one, four));
    }
    return 0;
}
