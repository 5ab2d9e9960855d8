#include "dispatch.hpp"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <iterator>

#include "openvino/core/except.hpp"

#if defined(__x86_64__) || defined(_M_X64)
#define EDGERT_X86
#ifdef _MSC_VER
#include <intrin.h>
#else
#include <cpuid.h>
#endif
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace edgert {

extern const Kernels scalar_kernels;
extern const Kernels amx_emulated_kernels;
#ifdef EDGERT_X86
extern const Kernels avx2_kernels;
extern const Kernels avx2_vnni_kernels;
extern const Kernels avx512vl_vnni_kernels;
extern const Kernels avx512_vnni_kernels;
extern const Kernels amx_int8_kernels;
#endif

namespace {

struct Cpu {
    bool avx2 = false;         // with FMA and F16C
    bool avx_vnni = false;
    bool avx512_vnni = false;  // with F, BW, DQ and VL
    bool amx_int8 = false;
};

#ifdef EDGERT_X86
struct Registers {
    unsigned eax, ebx, ecx, edx;
};

Registers cpuid(unsigned leaf, unsigned subleaf) {
    Registers r{};
#ifdef _MSC_VER
    int values[4];
    __cpuidex(values, static_cast<int>(leaf), static_cast<int>(subleaf));
    std::memcpy(&r, values, sizeof r);
#else
    __get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx);
#endif
    return r;
}

// Which registers the operating system saves (Intel SDM, volume 1, section 13.3).
unsigned long long enabled_state() {
#ifdef _MSC_VER
    return _xgetbv(0);
#else
    unsigned low = 0, high = 0;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return static_cast<unsigned long long>(high) << 32 | low;
#endif
}

// A process asks for the large state once (https://docs.kernel.org/arch/x86/xstate.html). Elsewhere than on Linux AMX stays
// unused.
bool may_use_tiles() {
#ifdef __linux__
    constexpr long request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
    return false;
#endif
}

// Bits: Intel SDM, volume 2, CPUID.
Cpu detect() {
    Cpu cpu;
    const auto has = [](unsigned word, int bit) { return (word >> bit & 1u) != 0; };
    if (cpuid(0, 0).eax < 7)
        return cpu;
    const auto basic = cpuid(1, 0);
    const auto extended = cpuid(7, 0);
    if (!has(basic.ecx, 27))  // OSXSAVE
        return cpu;
    const auto state = enabled_state();
    cpu.avx2 = (state & 0x6) == 0x6 && has(extended.ebx, 5) && has(basic.ecx, 12) && has(basic.ecx, 29);
    cpu.avx_vnni = cpu.avx2 && extended.eax >= 1 && has(cpuid(7, 1).eax, 4);
    cpu.avx512_vnni = cpu.avx2 && (state & 0xE6) == 0xE6 && has(extended.ebx, 16) && has(extended.ebx, 17) &&
                      has(extended.ebx, 30) && has(extended.ebx, 31) && has(extended.ecx, 11);
    cpu.amx_int8 = cpu.avx512_vnni && (state & 0x60000) == 0x60000 && has(extended.edx, 24) && has(extended.edx, 25) &&
                   may_use_tiles();
    return cpu;
}
#else
Cpu detect() {
    return {};
}
#endif

constexpr const char* kVariable = "EDGERT_KERNELS_MAX_ISA";
constexpr const char* kNames[] = {"scalar", "avx2", "avx2-vnni", "avx512-vnni", "amx-int8"};  // ascending

const Kernels* of_this_cpu(const char* name) {
    static const Cpu cpu = detect();
    const auto is = [&](const char* other) { return std::strcmp(name, other) == 0; };
#ifdef EDGERT_X86
    if (is("amx-int8") && cpu.amx_int8)
        return &amx_int8_kernels;
    if (is("avx512-vnni") && cpu.avx512_vnni)
        return &avx512_vnni_kernels;
    if (is("avx2-vnni") && cpu.avx_vnni)
        return &avx2_vnni_kernels;
    if (is("avx2-vnni") && cpu.avx512_vnni)
        return &avx512vl_vnni_kernels;
    if (is("avx2") && cpu.avx2)
        return &avx2_kernels;
#endif
    return is("scalar") ? &scalar_kernels : nullptr;
}

// The best up to `limit`; null where that is no name.
const Kernels* best_up_to(const char* limit) {
    if (std::strcmp(limit, amx_emulated_kernels.name) == 0)
        return &amx_emulated_kernels;  // only where it is asked for
    std::size_t highest = 0;
    while (highest < std::size(kNames) && std::strcmp(limit, kNames[highest]) != 0)
        ++highest;
    if (highest == std::size(kNames))
        return nullptr;
    for (auto i = highest; i > 0; --i)
        if (const auto* found = of_this_cpu(kNames[i]))
            return found;
    return &scalar_kernels;
}

// Null where the environment variable has no name of an instruction set.
std::atomic<const Kernels*>& chosen() {
    static std::atomic<const Kernels*> kernels{[] {
        const char* limit = std::getenv(kVariable);
        return best_up_to(limit == nullptr || *limit == '\0' ? kNames[std::size(kNames) - 1] : limit);
    }()};
    return kernels;
}

}  // namespace

const Kernels& kernels() {
    const auto* found = chosen().load(std::memory_order_relaxed);
    OPENVINO_ASSERT(found != nullptr, kVariable, " is '", std::getenv(kVariable),
                    "', expected scalar, avx2, avx2-vnni, avx512-vnni or amx-int8");
    return *found;
}

}  // namespace edgert

extern "C" {

EDGERT_EXPORT const char* edgert_kernels_isa() {
    const edgert::Kernels* found = edgert::chosen();
    return found == nullptr ? nullptr : found->name;
}

EDGERT_EXPORT const char* edgert_kernels_limit_isa(const char* limit) {
    const auto* found = limit == nullptr ? nullptr : edgert::best_up_to(limit);
    if (found == nullptr)
        return nullptr;
    edgert::chosen() = found;
    return found->name;
}
}
