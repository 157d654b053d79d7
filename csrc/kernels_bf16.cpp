// The loops of bfloat16 for AVX-512 with BF16, which adds the products of a pair of elements, the odd one first, each with one
// rounding: what the loops of attention.inl do in two instructions, but that numbers below 2^-126 are zeros here. The rest of the
// table is VNNI's. Only what stands between the pragmas may use those instructions.

#if defined(__x86_64__)

#include "kernels.h"

#include <immintrin.h>

#include <cstring>

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,prefer-vector-width=512")
#endif

namespace {

#define DS_HAS_AVX512
#include "lanes.inl"

// 32 elements, or the 16 that a row ends with.
static inline __attribute__((always_inline)) __m512bh load_short(const uint16_t* at, bool is_whole) {
    const __m256i* from = reinterpret_cast<const __m256i*>(at);
    return (__m512bh)(is_whole ? _mm512_loadu_si512(at) : _mm512_zextsi256_si512(_mm256_loadu_si256(from)));
}

// factor times the sums of `Heads` queries with `Rows` rows, at most 16 together.
template <size_t Heads, size_t Rows>
static inline __attribute__((always_inline)) void score_tile(const uint16_t* keys, int64_t stride, size_t dim, const uint16_t* queries,
                                                             float factor, float* scores) {
    static_assert(Heads * Rows <= 16, "sixteen sums are added up together");
    __m512 sums[16] = {};
    const auto add = [&](size_t d, bool is_whole) __attribute__((always_inline)) {
        __m512bh query[Heads];
        for (size_t h = 0; h < Heads; ++h) query[h] = load_short(queries + h * dim + d, is_whole);
        for (size_t r = 0; r < Rows; ++r) {
            const __m512bh key = load_short(keys + static_cast<int64_t>(r) * stride + d, is_whole);
            for (size_t h = 0; h < Heads; ++h) {
                __m512& sum = sums[(h * Rows + r) % 4 * 4 + (h * Rows + r) / 4];
                sum = _mm512_dpbf16_ps(sum, key, query[h]);
            }
        }
    };
    size_t d = 0;
    for (; d + 32 <= dim; d += 32) add(d, true);
    if (d < dim) add(d, false);
    float found[16];
    sum_tile((const Sixteen*)sums, factor, found);
    for (size_t h = 0; h < Heads; ++h) std::memcpy(scores + h * kChunk, found + h * Rows, Rows * sizeof *found);
}

template <size_t Heads>
static inline void score_heads(const uint16_t* keys, int64_t stride, size_t n, size_t dim, const uint16_t* queries, float factor,
                               float* scores, bool is_first) {
    constexpr size_t rows = 16 / Heads;
    size_t r = 0;
    for (; r + rows <= n; r += rows) {
        const uint16_t* here = keys + static_cast<int64_t>(r) * stride;
        if (is_first)
            for (size_t j = 0; j < rows; ++j) prefetch_row(here + static_cast<int64_t>(kTileRows + j) * stride, dim);
        score_tile<Heads, rows>(here, stride, dim, queries, factor, scores + r);
    }
    for (; r < n; ++r) score_tile<Heads, 1>(keys + static_cast<int64_t>(r) * stride, stride, dim, queries, factor, scores + r);
}

void score_short(const uint16_t* keys, int64_t stride, size_t n, size_t dim, const uint16_t* queries, size_t heads, float factor,
                 float* scores) {
    for (size_t at = 0; at < n; at += kTileRows) {
        const size_t rows = n - at < kTileRows ? n - at : kTileRows;
        const uint16_t* here = keys + static_cast<int64_t>(at) * stride;
        const auto score_some = [&](auto score, size_t h) {
            score(here, stride, rows, dim, queries + h * dim, factor, scores + h * kChunk + at, h == 0);
        };
        size_t h = 0;
        for (; h + 4 <= heads; h += 4) score_some(score_heads<4>, h);
        for (; h + 2 <= heads; h += 2) score_some(score_heads<2>, h);
        for (; h < heads; ++h) score_some(score_heads<1>, h);
    }
}

}  // namespace

#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

Kernels bf16_kernels(bool takes_512_bits_whole) {
    Kernels found = vnni_kernels(takes_512_bits_whole);
    found.attention.score_short = score_short;
    return found;
}

#endif
