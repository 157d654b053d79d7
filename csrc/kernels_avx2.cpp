// The loops for AVX2, FMA and F16C. Only what stands between the pragmas may use those instructions.

#if defined(__x86_64__)

#include "kernels.h"

#include <immintrin.h>

#include <cmath>
#include <cstring>

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

namespace {

void widen_fp16(const uint16_t* from, float* to, size_t n) {
    size_t i = 0;
    for (; i + 8 <= n; i += 8)
        _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
    for (; i < n; ++i) to[i] = _cvtsh_ss(from[i]);
}

void narrow_fp16(const float* from, uint16_t* to, size_t n) {
    size_t i = 0;
    for (; i + 8 <= n; i += 8)
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i),
                         _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT));
    for (; i < n; ++i) to[i] = _cvtss_sh(from[i], _MM_FROUND_TO_NEAREST_INT);
}

#define DS_HAS_AVX2
#include "kernels.inl"

}  // namespace

#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

Kernels avx2_kernels(bool has_large_first_cache) {
    Kernels found = kTable;
    if (has_large_first_cache) found.products = near_products(), found.attention.cache = 1;
    return found;
}

#endif
