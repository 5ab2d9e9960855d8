// Compiled twice: for AVX-VNNI, as processors without AVX-512 have it, and for the same 256-bit instructions in the
// encoding of AVX-512, so that a processor that has only those can be held to what the others can do.

#include "simd_avx2.hpp"

#include "attention_kernels.hpp"
#include "isa.hpp"

namespace edgert {
namespace {

struct VnniProducts {
    static __m256i bytes(__m256i acc, __m256i codes, __m256i four) {
#ifdef EDGERT_AVX512_ENCODING
        return _mm256_dpbusd_epi32(acc, codes, four);
#else
        return _mm256_dpbusd_avx_epi32(acc, codes, four);
#endif
    }
    static __m256i nibbles(__m256i acc, __m256i codes, __m256i four) { return bytes(acc, codes, four); }
};

}  // namespace

#ifdef EDGERT_AVX512_ENCODING
extern const AttentionKernels avx512vl_vnni_attention;
constexpr AttentionKernels avx512vl_vnni_attention = attention_kernels<Avx2<VnniProducts>>();
extern const Kernels avx512vl_vnni_kernels;
constexpr Kernels avx512vl_vnni_kernels = make_kernels<Avx2<VnniProducts>>("avx2-vnni", avx512vl_vnni_attention);
#else
extern const AttentionKernels avx2_vnni_attention;
constexpr AttentionKernels avx2_vnni_attention = attention_kernels<Avx2<VnniProducts>>();
extern const Kernels avx2_vnni_kernels;
constexpr Kernels avx2_vnni_kernels = make_kernels<Avx2<VnniProducts>>("avx2-vnni", avx2_vnni_attention);
#endif
}  // namespace edgert
