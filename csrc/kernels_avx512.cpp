// The loops for AVX-512 (F, BW, DQ, VL). Only what stands between the pragmas may use those instructions.

#if defined(__x86_64__)

#include "kernels.h"

#include <immintrin.h>

#include <cmath>
#include <cstring>

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,f16c,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,f16c,fma,prefer-vector-width=512")
#endif

namespace {

void widen_fp16(const uint16_t* from, float* to, size_t n) {
    size_t i = 0;
    for (; i + 16 <= n; i += 16)
        _mm512_storeu_ps(to + i, _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i))));
    for (; i < n; ++i) to[i] = _cvtsh_ss(from[i]);
}

void narrow_fp16(const float* from, uint16_t* to, size_t n) {
    size_t i = 0;
    for (; i + 16 <= n; i += 16)
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i),
                            _mm512_maskz_cvtps_ph(0xffff, _mm512_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT));
    for (; i < n; ++i) to[i] = _cvtss_sh(from[i], _MM_FROUND_TO_NEAREST_INT);
}

#define DS_HAS_AVX2
#define DS_HAS_AVX512
#include "kernels.inl"

}  // namespace

#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

Kernels avx512_kernels(bool takes_512_bits_whole) {
    Kernels found = kTable;
    if (takes_512_bits_whole) found.products = near_products(), found.attention.cache = 1;
    // The same loop, which a compiler makes shorter where it has 16 registers (Zen 4: 83 % of the bandwidth, 73 with 32).
    const Kernels narrow = avx2_kernels(takes_512_bits_whole);
    found.products.integers[0] = narrow.products.integers[0], found.products.several[0] = narrow.products.several[0];
    return found;
}

#endif
