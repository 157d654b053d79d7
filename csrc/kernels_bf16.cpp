// The loops of bfloat16 for AVX-512 with BF16, which adds the products of a pair of elements, the odd one first, each with one
// rounding: what the loops of attention.inl do in two instructions, but that numbers below 2^-126 are zeros here. A pair is two
// neighbours of a key, or an element of two positions' values, the earlier position as the odd one. The rest of the table is VNNI's.
// Only what stands between the pragmas may use those instructions.

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

// Rows that so many elements are in. Rows that are read once for all heads, in their order, come by themselves but for a few, and are
// held up by a tile that is asked for (Zen 4, one head, 256 bytes a row: scores at 19 GB/s, so 31; mixing at 21 and 33).
static inline size_t rows_of(size_t numel, size_t dim) { return (numel + dim - 1) / dim; }

template <size_t Heads>
static inline void score_heads(const uint16_t* keys, int64_t stride, size_t n, size_t dim, const uint16_t* queries, float factor,
                               float* scores, int cache) {
    constexpr size_t rows = Heads == 1 ? 4 : 16 / Heads;
    const size_t ahead = Heads == 1 ? rows_of(512, dim) : kTileRows;
    size_t r = 0;
    for (; r + rows <= n; r += rows) {
        const uint16_t* here = keys + static_cast<int64_t>(r) * stride;
        if (cache)
            for (size_t j = 0; j < rows; ++j) prefetch_row(here + static_cast<int64_t>(ahead + j) * stride, dim, cache);
        score_tile<Heads, rows>(here, stride, dim, queries, factor, scores + r);
    }
    for (; r < n; ++r) score_tile<Heads, 1>(keys + static_cast<int64_t>(r) * stride, stride, dim, queries, factor, scores + r);
}

void score_short(const uint16_t* keys, int64_t stride, size_t n, size_t dim, const uint16_t* queries, size_t heads, float factor,
                 float* scores, int cache) {
    for (size_t at = 0; at < n; at += kTileRows) {
        const size_t rows = n - at < kTileRows ? n - at : kTileRows;
        const uint16_t* here = keys + static_cast<int64_t>(at) * stride;
        const auto score_some = [&](auto score, size_t h) {
            score(here, stride, rows, dim, queries + h * dim, factor, scores + h * kChunk + at, h == 0 ? cache : 0);
        };
        size_t h = 0;
        // Eight at once, so that rows to come are asked for evenly (Zen 5: 18 GB/s by fours, so 20; 25 and 27 where rows begin at multiples of 256).
        for (; h + 8 <= heads; h += 8) score_some(score_heads<8>, h);
        for (; h + 4 <= heads; h += 4) score_some(score_heads<4>, h);
        for (; h + 2 <= heads; h += 2) score_some(score_heads<2>, h);
        for (; h < heads; ++h) score_some(score_heads<1>, h);
    }
}

// `Blocks` times 32 elements of out from d on, or the 16 that a row ends with, as unpacking leaves them. `pairs` are weights.
template <size_t Heads, size_t Blocks>
static inline __attribute__((always_inline)) void mix_blocks(const uint16_t* values, int64_t stride, size_t n, size_t dim, size_t d,
                                                             const uint32_t (*pairs)[kTileRows / 2], float* out, int cache) {
    const bool is_whole = d + 32 <= dim;
    const size_t ahead = Heads <= 2 ? rows_of(1024, dim) : kTileRows;
    const __mmask16 mask = is_whole ? 0xffff : 0xff;
    const auto half = [&](size_t h, size_t i) { return out + h * dim + d + (is_whole ? 16 : 8) * i; };
    __m512 sums[Heads][2 * Blocks];
    for (size_t h = 0; h < Heads; ++h)
        for (size_t i = 0; i < 2 * Blocks; ++i) sums[h][i] = _mm512_maskz_loadu_ps(mask, half(h, i));
    for (size_t r = 0; r < n; r += 2) {
        const uint16_t* const here = values + static_cast<int64_t>(r) * stride + d;
        if (cache)
            for (size_t j = 0; j < 2; ++j) prefetch_row(here + static_cast<int64_t>(ahead + j) * stride, 32 * Blocks, cache);
        for (size_t v = 0; v < Blocks; ++v) {
            const __m512i first = (__m512i)load_short(here + 32 * v, is_whole);
            const __m512i second = r + 1 < n ? (__m512i)load_short(here + stride + 32 * v, is_whole) : _mm512_setzero_si512();
            const __m512bh low = (__m512bh)_mm512_unpacklo_epi16(second, first), high = (__m512bh)_mm512_unpackhi_epi16(second, first);
            for (size_t h = 0; h < Heads; ++h) {
                const __m512bh pair = (__m512bh)_mm512_set1_epi32(static_cast<int>(pairs[h][r / 2]));
                sums[h][2 * v] = _mm512_dpbf16_ps(sums[h][2 * v], low, pair);
                sums[h][2 * v + 1] = _mm512_dpbf16_ps(sums[h][2 * v + 1], high, pair);
            }
        }
    }
    for (size_t h = 0; h < Heads; ++h)
        for (size_t i = 0; i < 2 * Blocks; ++i) _mm512_mask_storeu_ps(half(h, i), mask, sums[h][i]);
}

template <size_t Heads>
static inline void mix_heads(const uint16_t* values, int64_t stride, size_t n, size_t dim, const float* weights, float* out, int cache) {
    constexpr size_t blocks = Heads < 4 ? 4 : 8 / Heads;
    alignas(64) uint32_t pairs[Heads][kTileRows / 2];
    for (size_t h = 0; h < Heads; ++h)
        for (size_t r = 0; r < n; r += 16) {
            const __m512i both = _mm512_loadu_si512(weights + h * kChunk + r);
            const __m512i pair = _mm512_or_si512(_mm512_srli_epi64(both, 48), _mm512_and_si512(both, _mm512_set1_epi32(-65536)));
            _mm256_store_si256(reinterpret_cast<__m256i*>(pairs[h] + r / 2), _mm512_cvtepi64_epi32(pair));
        }
    size_t d = 0;
    for (; d + 32 * blocks <= dim; d += 32 * blocks) mix_blocks<Heads, blocks>(values, stride, n, dim, d, pairs, out, cache);
    for (; d < dim; d += 32) mix_blocks<Heads, 1>(values, stride, n, dim, d, pairs, out, cache);
}

void mix_short(const void* from, int64_t stride, size_t n, size_t dim, const float* weights, size_t heads, float* out, int cache) {
    const uint16_t* values = static_cast<const uint16_t*>(from);
    const size_t tile = heads / 4 == 1 ? kTileRows / 2 : kTileRows;  // Zen 4, four heads: 23 GB/s, so 26; eight: 20, 19
    for (size_t at = 0; at < n; at += tile) {
        const size_t rows = n - at < tile ? n - at : tile;
        const uint16_t* here = values + static_cast<int64_t>(at) * stride;
        const auto mix_some = [&](auto mixes, size_t h) {
            mixes(here, stride, rows, dim, weights + h * kChunk + at, out + h * dim, h == 0 ? cache : 0);
        };
        size_t h = 0;
        for (; h + 8 <= heads; h += 8) mix_some(mix_heads<8>, h);
        for (; h + 4 <= heads; h += 4) mix_some(mix_heads<4>, h);
        for (; h + 2 <= heads; h += 2) mix_some(mix_heads<2>, h);
        for (; h < heads; ++h) mix_some(mix_heads<1>, h);
    }
}

// Sums from the order in which mix_blocks leaves them: fours of each eight, the first ones and then the second ones.
void spread_short(float* x, size_t dim) {
    for (size_t i = 0; i < dim; i += 32) {
        const size_t half = dim - i < 32 ? 8 : 16;
        float whole[32];
        std::memcpy(whole, x + i, 2 * half * sizeof *whole);
        for (size_t j = 0; j < 2 * half; ++j) x[i + j] = whole[j / 8 * 4 + j % 4 + (j / 4 % 2 ? half : 0)];
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
    found.attention.mix_short = mix_short;
    found.attention.spread_short = spread_short;
    return found;
}

#endif
