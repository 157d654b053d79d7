// The loops of integers for AVX-512 with VNNI, which multiplies and adds four bytes or two words a lane in one instruction; the rest
// of the table is AVX-512's. Sums of integers are exact, and what is scaled lies in the lanes of products.inl: the same bits. Only
// what stands between the pragmas may use those instructions.

#if defined(__x86_64__)

#include "kernels.h"

#include <immintrin.h>

#include <cstring>
#include <vector>

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,prefer-vector-width=512")
#endif

namespace {

#define DS_HAS_AVX512
#include "lanes.inl"

#define DS_INLINE static inline __attribute__((always_inline))

DS_INLINE __m256i load_ymm(const void* at) { return _mm256_loadu_si256(static_cast<const __m256i*>(at)); }
DS_INLINE __m256i load_xmm(const void* at) { return _mm256_zextsi128_si256(_mm_loadu_si128(static_cast<const __m128i*>(at))); }

// ---- products with int4

using Second = Asks<3072, 2>;    // Zen 4, 1,024 bytes a row: 87 % of the bandwidth, 82 from 2048 and from 4096
using First = Asks<2048, 1>;     // Zen 5: products.inl
constexpr int kRows = 4;         // that are worked on together
constexpr size_t kScaled = 8;    // groups whose scales are multiplied at once
constexpr size_t kPlanes = 128;  // elements of a block: a register of a row

// Elements of x beside `half` bytes of a row as four planes of bytes: low bytes, signed, of the even ones, then high ones, then those of
// the odd ones. x = 256 high + low.
DS_INLINE void store_planes(const int16_t* q, size_t half, int8_t* planes) {
    for (size_t i = 0; i < half; i += 16) {
        const __m512i pairs = _mm512_loadu_si512(q + 2 * i), rounded = _mm512_add_epi32(pairs, _mm512_set1_epi32(0x800080));
        const auto store = [&](size_t p, __m512i x) { _mm_storeu_si128(reinterpret_cast<__m128i*>(planes + p * half + i), _mm512_cvtepi32_epi8(x)); };
        store(0, pairs), store(1, _mm512_srli_epi32(rounded, 8));
        store(2, _mm512_srli_epi32(pairs, 16)), store(3, _mm512_srli_epi32(_mm512_add_epi32(pairs, _mm512_set1_epi32(0x800000)), 24));
    }
}

// The first `n` bytes, zeros behind them.
DS_INLINE __m512i load_bytes(const void* at, size_t n) {
    return n >= 64 ? _mm512_loadu_si512(at) : _mm512_maskz_loadu_epi8((1ull << n) - 1, at);
}

// Dwords of 256 bytes, 8 groups of 64 weights, so that lanes belong to groups 0 2 4 6, 0 2 4 6, 1 3 5 7, 1 3 5 7: two registers of the even
// halves of each 16 bytes, or of the odd ones.
template <bool AreOdd>
DS_INLINE void turn_groups(__m512i a, __m512i b, __m512i c, __m512i d, __m512i* one, __m512i* other) {
    const __m512 ab = _mm512_castsi512_ps(AreOdd ? _mm512_unpackhi_epi64(a, b) : _mm512_unpacklo_epi64(a, b));
    const __m512 cd = _mm512_castsi512_ps(AreOdd ? _mm512_unpackhi_epi64(c, d) : _mm512_unpacklo_epi64(c, d));
    *one = _mm512_castps_si512(_mm512_shuffle_ps(ab, cd, 0x88)), *other = _mm512_castps_si512(_mm512_shuffle_ps(ab, cd, 0xdd));
}

// Groups of 64 by eights, as `turn_groups` leaves them: the four planes of each register; up to four groups at the end twice, for two
// rows. Other groups block by block (of a group, or of the whole row where groups are shorter).
void arrange_int4(const int16_t* q, size_t n, size_t group_size, int16_t* to) {
    if (group_size != 64) {
        const size_t part = group_size < 64 ? n : group_size;
        for (size_t at = 0, block; at < n; at += block) {
            const size_t left = part - at % part;
            block = left < kPlanes ? left : kPlanes;
            store_planes(q + at, block / 2, reinterpret_cast<int8_t*>(to + at));
        }
        return;
    }
    for (size_t at = 0; at < n; at += 4 * kPlanes) {
        alignas(64) int16_t eight[4 * kPlanes] = {};
        alignas(64) int8_t planes[4][4][64];
        std::memcpy(eight, q + at, (n - at < 4 * kPlanes ? n - at : 4 * kPlanes) * sizeof *q);
        if (n - at <= 2 * kPlanes) std::memcpy(eight + 2 * kPlanes, eight, 2 * kPlanes * sizeof *q);
        for (size_t i = 0; i < 4; ++i) store_planes(eight + i * kPlanes, 64, planes[i][0]);
        for (size_t p = 0; p < 4; ++p) {
            __m512i w[4], turned[4];
            for (size_t i = 0; i < 4; ++i) w[i] = _mm512_load_si512(planes[i][p]);
            turn_groups<false>(w[0], w[1], w[2], w[3], turned, turned + 1), turn_groups<true>(w[0], w[1], w[2], w[3], turned + 2, turned + 3);
            for (size_t i = 0; i < 4; ++i) _mm512_storeu_si512(reinterpret_cast<int8_t*>(to + at) + i * 256 + p * 64, turned[i]);
        }
    }
}

struct Nibbles {
    __m512i even, odd;
};

DS_INLINE Nibbles nibbles_of(__m512i words) {
    const __m512i nibble = _mm512_set1_epi8(15);
    return {_mm512_and_si512(words, nibble), _mm512_and_si512(_mm512_srli_epi16(words, 4), nibble)};
}

DS_INLINE __m256i upper(__m512i x) { return _mm512_extracti64x4_epi64(x, 1); }
DS_INLINE __m256i half(__m256i x, int i) {  // zeros behind it
    return _mm256_zextsi128_si256(i ? _mm256_extracti128_si256(x, 1) : _mm256_castsi256_si128(x));
}

struct Planes {
    __m512i even_low, even_high, odd_low, odd_high;
};

// What products of turned groups add up to, odd elements 16 times as large: two halves of 8 groups in their order.
DS_INLINE __m512i halves_of(__m512i low, __m512i high, __m512i odd_low, __m512i odd_high) {
    const __m512i even = _mm512_add_epi32(low, _mm512_slli_epi32(high, 8)), odd = _mm512_add_epi32(odd_low, _mm512_slli_epi32(odd_high, 8));
    const __m512i in_order = _mm512_setr_epi32(0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15);
    return _mm512_permutexvar_epi32(in_order, _mm512_add_epi32(even, _mm512_srai_epi32(odd, 4)));
}

// take(k, the exact products of 8 groups of 64) for each of `Num` rows with what `arrange_int4` made; load(k, i): groups 2i and 2i + 1.
template <int Num, class Load, class Ask, class Take>
DS_INLINE void sum_groups(const int8_t* planes, const Load& load, const Ask& ask, const Take& take) {
    // Odd elements stay where they are in their bytes, 16 times as large: a shift less for each register, and four sums, not two, that
    // need not wait for each other.
    __m512i low[Num] = {}, high[Num] = {}, odd_low[Num] = {}, odd_high[Num] = {}, one[Num], other[Num];
    const auto meet = [&](const __m512i* words, size_t line) __attribute__((always_inline)) {
        const auto beside = [&](size_t p) __attribute__((always_inline)) { return _mm512_loadu_si512(planes + 256 * line + 64 * p); };
        const Planes by = {beside(0), beside(1), beside(2), beside(3)};
        ask(line);
        for (int k = 0; k < Num; ++k) {
            const __m512i even = _mm512_and_si512(words[k], _mm512_set1_epi8(15)), odd = _mm512_and_si512(words[k], _mm512_set1_epi8(-16));
            low[k] = _mm512_dpbusd_epi32(low[k], even, by.even_low), high[k] = _mm512_dpbusd_epi32(high[k], even, by.even_high);
            odd_low[k] = _mm512_dpbusd_epi32(odd_low[k], odd, by.odd_low), odd_high[k] = _mm512_dpbusd_epi32(odd_high[k], odd, by.odd_high);
        }
    };
    for (int k = 0; k < Num; ++k) turn_groups<false>(load(k, 0), load(k, 1), load(k, 2), load(k, 3), &one[k], &other[k]);
    meet(one, 0), meet(other, 1);
    for (int k = 0; k < Num; ++k) turn_groups<true>(load(k, 0), load(k, 1), load(k, 2), load(k, 3), &one[k], &other[k]);
    meet(one, 2), meet(other, 3);
    for (int k = 0; k < Num; ++k) {
        const __m512i halves = halves_of(low[k], high[k], odd_low[k], odd_high[k]);
        take(k, _mm256_add_epi32(_mm512_castsi512_si256(halves), upper(halves)));
    }
}

// Groups 2i and 2i + 1 of `count`.
DS_INLINE __m512i load_two(const uint8_t* w, size_t i, size_t count) {
    return count >= 2 * i + 2 ? _mm512_loadu_si512(w + 64 * i) : _mm512_maskz_loadu_epi32(count == 2 * i + 1 ? 0xff : 0, w + 64 * i);
}

DS_INLINE void add_scaled(__m256& sum, __m256i exact, __m256 by) { sum = _mm256_add_ps(sum, _mm256_mul_ps(_mm256_cvtepi32_ps(exact), by)); }

// The less than 8 groups that rows end with, at most four of two rows as one. Apart, for the sake of the registers of the loop before it.
template <class Ask>
__attribute__((noinline)) void sum_last(const IntegerRows& rows, const Integers& x, int first, size_t g, Floats8* lanes) {
    const uint8_t* const* const w = rows.values + first;
    const float* const* const s = rows.scales + first;
    const size_t count = x.num_groups - g;
    const int8_t* const planes = reinterpret_cast<const int8_t*>(x.values) + 128 * g;
    const auto scale = [&](int k, __m256i exact) __attribute__((always_inline)) {
        const __m256 scales = _mm256_maskz_loadu_ps(static_cast<__mmask8>((1u << count) - 1), s[k] + g);
        __m256 sum = (__m256)lanes[k];
        add_scaled(sum, _mm256_add_epi32(exact, load_ymm(x.offsets + g)), _mm256_mul_ps(scales, _mm256_loadu_ps(x.scales + g)));
        lanes[k] = (Floats8)sum;
    };
    if (count > 4) {
        const auto load = [&](int k, size_t i) __attribute__((always_inline)) { return load_two(w[k] + 32 * g, i, count); };
        const auto ask = [&](size_t line) __attribute__((always_inline)) {
            for (int k = 0; k < kRows; ++k) Ask::ahead_of(w[k] + 32 * g + 64 * line);
        };
        sum_groups<kRows>(planes, load, ask, scale);
        return;
    }
    const auto load = [&](int k, size_t i) __attribute__((always_inline)) { return load_two(w[2 * k + i / 2] + 32 * g, i % 2, count); };
    const auto ask = [&](size_t line) __attribute__((always_inline)) {
        for (size_t k = 0; k < kRows; k += 2) Ask::ahead_of(w[k + line / 2] + 32 * g + 64 * (line % 2));
    };
    sum_groups<kRows / 2>(planes, load, ask, [&](int k, __m256i both) __attribute__((always_inline)) {
        for (int i = 0; i < 2; ++i) scale(2 * k + i, half(both, i));
    });
}

// Groups of 64: sum_eights of products.inl.
template <class Ask>
static void sum_eights(const IntegerRows& rows, const Integers& x, int first, Floats8* lanes) {
    const uint8_t* w[kRows];
    const float* s[kRows];
    __m256 sums[kRows];
    for (int k = 0; k < kRows; ++k) w[k] = rows.values[first + k], s[k] = rows.scales[first + k], sums[k] = _mm256_setzero_ps();
    const int8_t* const planes = reinterpret_cast<const int8_t*>(x.values);
    size_t g = 0;
    for (; g + 8 <= x.num_groups; g += 8) {
        const auto load = [&](int k, size_t i) __attribute__((always_inline)) { return _mm512_loadu_si512(w[k] + 32 * g + 64 * i); };
        const auto ask = [&](size_t line) __attribute__((always_inline)) {
            for (int k = 0; k < kRows; ++k) Ask::ahead_of(w[k] + 32 * g + 64 * line);
        };
        const __m256 own = _mm256_loadu_ps(x.scales + g);
        const __m256i offset = load_ymm(x.offsets + g);
        sum_groups<kRows>(planes + 128 * g, load, ask, [&](int k, __m256i exact) __attribute__((always_inline)) {
            prefetch_scale(s[k], g);
            add_scaled(sums[k], _mm256_add_epi32(exact, offset), _mm256_mul_ps(_mm256_loadu_ps(s[k] + g), own));
        });
    }
    for (int k = 0; k < kRows; ++k) lanes[k] = (Floats8)sums[k];
    if (g < x.num_groups) sum_last<Ask>(rows, x, first, g, lanes);
}

DS_INLINE Planes planes_of(const int8_t* x, size_t half) {
    return {load_bytes(x, half), load_bytes(x + half, half), load_bytes(x + 2 * half, half), load_bytes(x + 3 * half, half)};
}

DS_INLINE __m512i add_low(__m512i sum, const Nibbles& w, const Planes& x) {
    return _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(sum, w.even, x.even_low), w.odd, x.odd_low);
}
DS_INLINE __m512i add_high(__m512i sum, const Nibbles& w, const Planes& x) {
    return _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(sum, w.even, x.even_high), w.odd, x.odd_high);
}

// Rows [first, first + kRows) as sum_rows of products.inl: four groups of 32 side by side in a register, or blocks of one larger group.
template <class Ask, bool Are32>
static void sum_rows(const IntegerRows& rows, const Integers& x, int first, Floats8* lanes) {
    const size_t step = (Are32 ? 32 : x.group_size) / 2, num_groups = x.num_groups;
    const uint8_t* w[kRows];
    const float* s[kRows];
    __m256 sums[kRows];
    for (int k = 0; k < kRows; ++k) {
        w[k] = rows.values[first + k], s[k] = rows.scales[first + k];
        sum_offsets(s[k], x, &lanes[k]);
        sums[k] = (__m256)lanes[k];
    }
    const int8_t* values = reinterpret_cast<const int8_t*>(x.values);
    for (size_t g = 0; g < num_groups; g += kScaled) {
        float scales[kRows][kScaled];
        const size_t count = num_groups - g < kScaled ? num_groups - g : kScaled;
        const __mmask8 mask = static_cast<__mmask8>((1u << count) - 1);
        const __m256 own = _mm256_maskz_loadu_ps(mask, x.scales + g);
        for (int k = 0; k < kRows; ++k) {
            prefetch_scale(s[k], g);
            _mm256_storeu_ps(scales[k], _mm256_mul_ps(_mm256_maskz_loadu_ps(static_cast<__mmask8>(mask), s[k] + g), own));
        }
        for (size_t j = 0; j < count; j += Are32 ? 4 : 1) {
            __m512i low[kRows] = {}, high[kRows] = {};
            const size_t start = (g + j) * step, all = Are32 ? (count - j < 4 ? count - j : 4) * step : step;
            for (size_t i = 0; i < all; i += 64) {
                const size_t nbytes = all - i < 64 ? all - i : 64;
                const Planes planes = planes_of(values + 4 * (start + i), nbytes);
                for (int k = 0; k < kRows; ++k) {
                    Ask::ahead_of(w[k] + start + i);
                    const Nibbles nibbles = nibbles_of(load_bytes(w[k] + start + i, nbytes));
                    low[k] = add_low(low[k], nibbles, planes), high[k] = add_high(high[k], nibbles, planes);
                }
            }
            for (int k = 0; k < kRows; ++k) {
                const __m512i exact = _mm512_add_epi32(low[k], _mm512_slli_epi32(high[k], 8));
                const __m256i front = _mm512_castsi512_si256(exact), back = upper(exact);
                if (!Are32) {
                    add_scaled(sums[k], _mm256_add_epi32(front, back), _mm256_set1_ps(scales[k][j]));
                    continue;
                }
                add_scaled(sums[k], half(front, 0), _mm256_set1_ps(scales[k][j]));
                if (j + 1 < count) add_scaled(sums[k], half(front, 1), _mm256_set1_ps(scales[k][j + 1]));
                if (j + 2 < count) add_scaled(sums[k], half(back, 0), _mm256_set1_ps(scales[k][j + 2]));
                if (j + 3 < count) add_scaled(sums[k], half(back, 1), _mm256_set1_ps(scales[k][j + 3]));
            }
        }
    }
    for (int k = 0; k < kRows; ++k) lanes[k] = (Floats8)sums[k];
}

template <class Ask>
void dot_int4(const IntegerRows& rows, const Integers& x, float* out) {
    const auto sum = x.group_size == 64 ? sum_eights<Ask> : x.group_size == 32 ? sum_rows<Ask, true> : sum_rows<Ask, false>;
    Floats8 lanes[kStreams];
    for (int first = 0; first < kStreams; first += kRows) sum(rows, x, first, lanes + first);
    sum_lanes(lanes, out);
}

// ---- products of several rows: two rows of a weight are in registers while all of x meet them

// The lanes of two rows, of which the upper eight fall on the lower ones, side by side.
DS_INLINE __m512i fold_two(__m512i one, __m512i other) {
    return _mm512_add_epi32(_mm512_shuffle_i64x2(one, other, 0x44), _mm512_shuffle_i64x2(one, other, 0xee));
}
DS_INLINE __m512 side_by_side(__m256 one, __m256 other) { return _mm512_insertf32x8(_mm512_castps256_ps512(one), other, 1); }
DS_INLINE void add_two(__m512& sums, __m512i exact, __m512 by) { sums = _mm512_add_ps(sums, _mm512_mul_ps(_mm512_cvtepi32_ps(exact), by)); }

// lanes [batch, kStreams] of the rows k and k + 1.
DS_INLINE void store_two(const __m512* sums, size_t batch, int k, Floats8* lanes) {
    for (size_t b = 0; b < batch; ++b)
        lanes[b * kStreams + k] = (Floats8)_mm512_castps512_ps256(sums[b]), lanes[b * kStreams + k + 1] = (Floats8)_mm512_extractf32x8_ps(sums[b], 1);
}

// sum_rows of products.inl for int8.
template <class Ask, size_t Size>
static void several_bytes(const IntegerRows& rows, const Integers* x, size_t batch, float* out) {
    const size_t size = Size ? Size : x->group_size;
    Floats8 lanes[kBatch * kStreams];
    for (int k = 0; k < kStreams; k += 2) {
        const uint8_t *w0 = rows.values[k], *w1 = rows.values[k + 1];
        const float *s0 = rows.scales[k], *s1 = rows.scales[k + 1];
        __m512 sums[kBatch] = {};
        for (size_t g = 0, at = 0; g < x->num_groups; ++g, at += size) {
            prefetch_scale(s0, g), prefetch_scale(s1, g);
            for (size_t i = 0; i < size; i += 64) Ask::ahead_of(w0 + at + i), Ask::ahead_of(w1 + at + i);
            const __m512 own = side_by_side(_mm256_set1_ps(s0[g]), _mm256_set1_ps(s1[g]));
            for (size_t b = 0; b < batch; ++b) {
                __m512i one = _mm512_setzero_si512(), other = one;
                for (size_t i = 0; i < size; i += 32) {
                    const __m512i beside = _mm512_loadu_si512(x[b].values + at + i);
                    one = _mm512_dpwssd_epi32(one, _mm512_cvtepi8_epi16(load_ymm(w0 + at + i)), beside);
                    other = _mm512_dpwssd_epi32(other, _mm512_cvtepi8_epi16(load_ymm(w1 + at + i)), beside);
                }
                add_two(sums[b], fold_two(one, other), _mm512_mul_ps(own, _mm512_set1_ps(x[b].scales[g])));
            }
        }
        store_two(sums, batch, k, lanes);
    }
    for (size_t b = 0; b < batch; ++b) sum_lanes(lanes + b * kStreams, out + b * kStreams);
}

template <class Ask>
void several_int8(const IntegerRows& rows, const Integers* x, size_t batch, float* out) {
    (x->group_size == 64 ? several_bytes<Ask, 64> : several_bytes<Ask, 0>)(rows, x, batch, out);
}

// sum_eights, for int4 in groups of 64.
template <class Ask>
static void several_eights(const IntegerRows& rows, const Integers* x, size_t batch, float* out) {
    const size_t whole = x->num_groups / 8 * 8;
    Floats8 lanes[kBatch * kStreams];
    for (int k = 0; k < kStreams; k += 2) {
        const uint8_t* const w[2] = {rows.values[k], rows.values[k + 1]};
        const float* const s[2] = {rows.scales[k], rows.scales[k + 1]};
        __m512 sums[kBatch] = {};
        for (size_t g = 0; g < whole; g += 8) {
            __m512i even[2][4], odd[2][4];
            for (int r = 0; r < 2; ++r) {
                __m512i four[4], turned[4];
                prefetch_scale(s[r], g);
                for (size_t i = 0; i < 4; ++i) Ask::ahead_of(w[r] + 32 * g + 64 * i), four[i] = _mm512_loadu_si512(w[r] + 32 * g + 64 * i);
                turn_groups<false>(four[0], four[1], four[2], four[3], turned, turned + 1);
                turn_groups<true>(four[0], four[1], four[2], four[3], turned + 2, turned + 3);
                for (size_t i = 0; i < 4; ++i) {
                    even[r][i] = _mm512_and_si512(turned[i], _mm512_set1_epi8(15));
                    odd[r][i] = _mm512_and_si512(turned[i], _mm512_set1_epi8(-16));
                }
            }
            const __m512 own = side_by_side(_mm256_loadu_ps(s[0] + g), _mm256_loadu_ps(s[1] + g));
            for (size_t b = 0; b < batch; ++b) {
                const int8_t* const planes = reinterpret_cast<const int8_t*>(x[b].values) + 128 * g;
                __m512i low[2] = {}, high[2] = {}, odd_low[2] = {}, odd_high[2] = {}, halves[2];
                for (size_t i = 0; i < 4; ++i) {
                    const auto beside = [&](size_t p) __attribute__((always_inline)) { return _mm512_loadu_si512(planes + 256 * i + 64 * p); };
                    const Planes by = {beside(0), beside(1), beside(2), beside(3)};
                    for (int r = 0; r < 2; ++r) {
                        low[r] = _mm512_dpbusd_epi32(low[r], even[r][i], by.even_low), high[r] = _mm512_dpbusd_epi32(high[r], even[r][i], by.even_high);
                        odd_low[r] = _mm512_dpbusd_epi32(odd_low[r], odd[r][i], by.odd_low), odd_high[r] = _mm512_dpbusd_epi32(odd_high[r], odd[r][i], by.odd_high);
                    }
                }
                for (int r = 0; r < 2; ++r) halves[r] = halves_of(low[r], high[r], odd_low[r], odd_high[r]);
                const __m512i offsets = _mm512_broadcast_i32x8(load_ymm(x[b].offsets + g));
                const __m512 scales = _mm512_mul_ps(own, _mm512_broadcast_f32x8(_mm256_loadu_ps(x[b].scales + g)));
                add_two(sums[b], _mm512_add_epi32(fold_two(halves[0], halves[1]), offsets), scales);
            }
        }
        store_two(sums, batch, k, lanes);
    }
    for (size_t b = 0; b < batch; ++b) {
        for (int first = 0; whole < x->num_groups && first < kStreams; first += kRows) sum_last<Ask>(rows, x[b], first, whole, lanes + b * kStreams + first);
        sum_lanes(lanes + b * kStreams, out + b * kStreams);
    }
}

template <class Ask>
void several_int4(const IntegerRows& rows, const Integers* x, size_t batch, float* out) {
    if (x->group_size == 64 && batch > 2) return several_eights<Ask>(rows, x, batch, out);  // two: 5.1 ms for 4.6 one by one (Zen 5, 96 MiB)
    for (size_t b = 0; b < batch; ++b) dot_int4<Ask>(rows, x[b], out + b * kStreams);
}

// ---- attention over a cache of int8

// Rows that the cache is asked for ahead, and that are mixed with all heads before the next ones: 16 KiB of them.
DS_INLINE size_t rows_ahead(size_t dim) { return 16384 / dim / 2 * 2; }

// 32 elements as words, or the 16 that a row ends with.
DS_INLINE __m512i words_of(const int8_t* at, bool is_whole) { return _mm512_cvtepi8_epi16(is_whole ? load_ymm(at) : load_xmm(at)); }
DS_INLINE __m512i load_words(const int16_t* at, bool is_whole) {
    return is_whole ? _mm512_loadu_si512(at) : _mm512_zextsi256_si512(load_ymm(at));
}

// Each of 16 registers' lanes added up, in their order.
DS_INLINE __m512i sum_each(__m512i* v) {
    for (int i = 0; i < 8; ++i)
        v[i] = _mm512_add_epi32(_mm512_unpacklo_epi32(v[2 * i], v[2 * i + 1]), _mm512_unpackhi_epi32(v[2 * i], v[2 * i + 1]));
    for (int i = 0; i < 4; ++i)
        v[i] = _mm512_add_epi32(_mm512_unpacklo_epi64(v[2 * i], v[2 * i + 1]), _mm512_unpackhi_epi64(v[2 * i], v[2 * i + 1]));
    for (int i = 0; i < 2; ++i)
        v[i] = _mm512_add_epi32(_mm512_shuffle_i64x2(v[2 * i], v[2 * i + 1], 0x88), _mm512_shuffle_i64x2(v[2 * i], v[2 * i + 1], 0xdd));
    return _mm512_add_epi32(_mm512_shuffle_i64x2(v[0], v[1], 0x88), _mm512_shuffle_i64x2(v[0], v[1], 0xdd));
}

template <int Heads>
DS_INLINE void score_tile(const int8_t* keys, int64_t stride, size_t dim, const int16_t* queries, int32_t* sums) {
    constexpr int rows = 16 / Heads;
    __m512i lanes[16] = {};
    const auto add = [&](size_t d, bool is_whole) __attribute__((always_inline)) {
        __m512i query[Heads];
        for (int h = 0; h < Heads; ++h) query[h] = load_words(queries + h * dim + d, is_whole);
        for (int r = 0; r < rows; ++r) {
            const __m512i key = words_of(keys + r * stride + d, is_whole);
            for (int h = 0; h < Heads; ++h) lanes[h * rows + r] = _mm512_dpwssd_epi32(lanes[h * rows + r], key, query[h]);
        }
    };
    size_t d = 0;
    for (; d + 32 <= dim; d += 32) add(d, true);
    if (d < dim) add(d, false);
    alignas(64) int32_t found[16];
    _mm512_store_si512(found, sum_each(lanes));
    for (int h = 0; h < Heads; ++h) std::memcpy(sums + h * kChunk, found + h * rows, rows * sizeof *sums);
}

constexpr size_t kMostParts = 8;  // of 64 bytes in a row: 512 elements

// Four queries as bytes, x = 256 high + low, beside rows as `turn_four` leaves them: of each 64 elements the words of 4 neighbours whose
// number is j mod 4, low and high ones, each as often as there are rows. Zeros past a row's end. `starts` takes back the 128 that is
// added to keys.
struct alignas(64) Halves {
    int32_t words[kMostParts][4][4][2][16];  // part, j, head
    int32_t starts[4];

    void fill(const int16_t* queries, size_t dim) {
        for (size_t h = 0; h < 4; ++h) {
            __m512i sum = _mm512_setzero_si512();
            for (size_t d = 0; d < dim; d += 64) {
                __m256i low[2], high[2];
                for (size_t i = 0; i < 2; ++i) {
                    const size_t at = d + 32 * i;
                    const __m512i x = at >= dim ? _mm512_setzero_si512() : load_words(queries + h * dim + at, at + 32 <= dim);
                    low[i] = _mm512_cvtepi16_epi8(x);
                    high[i] = _mm512_cvtepi16_epi8(_mm512_srai_epi16(_mm512_sub_epi16(x, _mm512_cvtepi8_epi16(low[i])), 8));
                    sum = _mm512_add_epi32(sum, _mm512_madd_epi16(x, _mm512_set1_epi16(-128)));
                }
                const __m512i lows = _mm512_inserti64x4(_mm512_castsi256_si512(low[0]), low[1], 1);
                const __m512i highs = _mm512_inserti64x4(_mm512_castsi256_si512(high[0]), high[1], 1);
                const auto store = [&](size_t j, __m512i first, __m512i second) {
                    _mm512_store_si512(words[d / 64][j][h][0], first), _mm512_store_si512(words[d / 64][j][h][1], second);
                };
                store(0, _mm512_shuffle_epi32(lows, _MM_PERM_AAAA), _mm512_shuffle_epi32(highs, _MM_PERM_AAAA));
                store(1, _mm512_shuffle_epi32(lows, _MM_PERM_BBBB), _mm512_shuffle_epi32(highs, _MM_PERM_BBBB));
                store(2, _mm512_shuffle_epi32(lows, _MM_PERM_CCCC), _mm512_shuffle_epi32(highs, _MM_PERM_CCCC));
                store(3, _mm512_shuffle_epi32(lows, _MM_PERM_DDDD), _mm512_shuffle_epi32(highs, _MM_PERM_DDDD));
            }
            starts[h] = _mm512_reduce_add_epi32(sum);
        }
    }
};

// 4 rows of 64 bytes, 128 added, so that the register j of `to` holds words j, 4 + j, 8 + j and 12 + j of every row: lanes are rows.
DS_INLINE void turn_four(const int8_t* keys, int64_t stride, __mmask64 mask, __m512i* to) {
    const __m512i added = _mm512_set1_epi8(static_cast<char>(0x80));
    __m512i v[4];
    for (int r = 0; r < 4; ++r) v[r] = _mm512_xor_si512(_mm512_maskz_loadu_epi8(mask, keys + r * stride), added);
    const __m512i a = _mm512_unpacklo_epi32(v[0], v[1]), b = _mm512_unpackhi_epi32(v[0], v[1]);
    const __m512i c = _mm512_unpacklo_epi32(v[2], v[3]), d = _mm512_unpackhi_epi32(v[2], v[3]);
    to[0] = _mm512_unpacklo_epi64(a, c), to[1] = _mm512_unpackhi_epi64(a, c);
    to[2] = _mm512_unpacklo_epi64(b, d), to[3] = _mm512_unpackhi_epi64(b, d);
}

// Rows to come, asked for a line at a time.
struct Coming {
    const int8_t* row;
    int64_t stride;
    size_t dim, at;
    int cache;

    inline __attribute__((always_inline)) void next() {
        ask_for(row + at, cache);
        at += 64;
        if (at >= dim) at = 0, row += stride;
    }
};

// Lanes of 128 bits added up: those of a, b, c and d.
DS_INLINE __m512i sum_quarters(__m512i a, __m512i b, __m512i c, __m512i d) {
    const __m512i front = _mm512_add_epi32(_mm512_shuffle_i64x2(a, b, 0x44), _mm512_shuffle_i64x2(a, b, 0xee));
    const __m512i back = _mm512_add_epi32(_mm512_shuffle_i64x2(c, d, 0x44), _mm512_shuffle_i64x2(c, d, 0xee));
    return _mm512_add_epi32(_mm512_shuffle_i64x2(front, back, 0x88), _mm512_shuffle_i64x2(front, back, 0xdd));
}

// A compiler would read them again for each product, and a cycle has one such read.
DS_INLINE void keep_in_registers(__m512i& a, __m512i& b) { __asm__("" : "+v"(a), "+v"(b)); }

// Sums of 8 rows with four queries: words of queries that are read serve two registers of rows.
template <int Cache>
DS_INLINE void score_eight(const int8_t* keys, int64_t stride, size_t dim, const Halves& queries, int32_t* sums) {
    const int64_t ahead = static_cast<int64_t>(rows_ahead(dim));
    __m512i low[4][2], high[4][2];
    for (int h = 0; h < 4; ++h)
        for (int i = 0; i < 2; ++i) low[h][i] = _mm512_maskz_set1_epi32(0xf, queries.starts[h]), high[h][i] = _mm512_setzero_si512();
    for (size_t d = 0; d < dim; d += 64) {
        const __mmask64 mask = dim - d >= 64 ? ~0ull : (1ull << (dim - d)) - 1;
        __m512i rows[2][4];
        for (int i = 0; i < 2; ++i) turn_four(keys + 4 * i * stride + d, stride, mask, rows[i]);
        for (int j = 0; j < 4; ++j) {
            if (Cache)
                for (int i = 0; i < 2; ++i) ask_for(keys + (ahead + 2 * j + i) * stride + d, Cache);
            for (int h = 0; h < 4; ++h) {
                const auto& query = queries.words[d / 64][j][h];
                __m512i query_low = _mm512_load_si512(query[0]), query_high = _mm512_load_si512(query[1]);
                keep_in_registers(query_low, query_high);
                for (int i = 0; i < 2; ++i) low[h][i] = _mm512_dpbusd_epi32(low[h][i], rows[i][j], query_low);
                for (int i = 0; i < 2; ++i) high[h][i] = _mm512_dpbusd_epi32(high[h][i], rows[i][j], query_high);
            }
        }
    }
    for (int h = 0; h < 4; ++h)
        for (int i = 0; i < 2; ++i) low[h][i] = _mm512_add_epi32(low[h][i], _mm512_slli_epi32(high[h][i], 8));
    for (int h = 0; h < 4; h += 2) {
        const __m512i both = sum_quarters(low[h][0], low[h][1], low[h + 1][0], low[h + 1][1]);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(sums + h * kChunk), _mm512_castsi512_si256(both));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(sums + (h + 1) * kChunk), upper(both));
    }
}

// Rows [r, n), fewer than are worked on together.
template <int Heads>
static void score_rest(const int8_t* keys, int64_t stride, size_t r, size_t n, size_t dim, const int16_t* queries, int32_t* sums) {
    for (; r < n; ++r)
        for (int h = 0; h < Heads; ++h) {
            int32_t sum = 0;
            for (size_t d = 0; d < dim; ++d) sum += keys[static_cast<int64_t>(r) * stride + static_cast<int64_t>(d)] * queries[h * dim + d];
            sums[h * kChunk + r] = sum;
        }
}

template <int Heads>
static void score_heads(const int8_t* keys, int64_t stride, size_t n, size_t dim, const int16_t* queries, int32_t* sums, int cache) {
    constexpr size_t rows = 16 / Heads;
    const size_t ahead = rows_ahead(dim);
    size_t r = 0;
    for (; r + rows <= n; r += rows) {
        const int8_t* here = keys + static_cast<int64_t>(r) * stride;
        if (cache)
            for (size_t j = 0; j < rows; ++j) prefetch_row(here + static_cast<int64_t>(ahead + j) * stride, dim, cache);
        score_tile<Heads>(here, stride, dim, queries, sums + r);
    }
    score_rest<Heads>(keys, stride, r, n, dim, queries, sums);
}

// As score_heads, of a multiple of four heads.
template <int Cache>
static void score_fours(const int8_t* keys, int64_t stride, size_t n, size_t dim, const int16_t* queries, size_t heads, int32_t* sums) {
    static thread_local std::vector<Halves> halves;
    halves.resize(heads / 4);
    for (size_t i = 0; i < heads / 4; ++i) halves[i].fill(queries + 4 * i * dim, dim);
    size_t r = 0;
    for (; r + 8 <= n; r += 8) {
        const int8_t* here = keys + static_cast<int64_t>(r) * stride;
        score_eight<Cache>(here, stride, dim, halves[0], sums + r);
        for (size_t i = 1; i < heads / 4; ++i) score_eight<0>(here, stride, dim, halves[i], sums + 4 * i * kChunk + r);
    }
    for (size_t i = 0; i < heads; i += 4) score_rest<4>(keys, stride, r, n, dim, queries + i * dim, sums + i * kChunk);
}

void score_bytes(const int8_t* keys, int64_t stride, size_t n, size_t dim, const int16_t* queries, size_t heads, int32_t* sums, int cache) {
    const size_t h = heads / 4 * 4;
    if (h > 0) (cache == 1 ? score_fours<1> : score_fours<2>)(keys, stride, n, dim, queries, h, sums);
    for (size_t at = 0; at < n && h < heads; at += kTileRows) {
        const size_t rows = n - at < kTileRows ? n - at : kTileRows;
        const int8_t* here = keys + static_cast<int64_t>(at) * stride;
        const auto score_some = [&](auto scores, size_t i) { scores(here, stride, rows, dim, queries + i * dim, sums + i * kChunk + at, i == 0 ? cache : 0); };
        size_t i = h;
        for (; i + 2 <= heads; i += 2) score_some(score_heads<2>, i);
        for (; i < heads; ++i) score_some(score_heads<1>, i);
    }
}

DS_INLINE __m512i pair_of(const int16_t* weights) {
    int32_t both;
    std::memcpy(&both, weights, sizeof both);
    return _mm512_set1_epi32(both);
}

// `Blocks` times 32 elements of out (16 where Whole is false) += the values of two positions at a time. The sums of four neighbours
// lie together as unpacking leaves them, and are put in order at the end.
template <int Heads, int Blocks, bool Whole>
DS_INLINE void mix_tile(const int8_t* values, int64_t stride, size_t n, size_t dim, const int16_t* weights, int32_t* out, Coming& coming, int lines) {
    __m512i sums[Heads][Blocks][2] = {};
    for (size_t r = 0; r < n; r += 2) {
        const int8_t* at = values + static_cast<int64_t>(r) * stride;
        for (int i = 0; i < lines; ++i) coming.next();
        __m512i low[Blocks], high[Blocks];
        for (int v = 0; v < Blocks; ++v) {
            const __m512i first = words_of(at + 32 * v, Whole), second = r + 1 < n ? words_of(at + stride + 32 * v, Whole) : _mm512_setzero_si512();
            low[v] = _mm512_unpacklo_epi16(first, second), high[v] = _mm512_unpackhi_epi16(first, second);
        }
        for (int h = 0; h < Heads; ++h) {
            const __m512i pair = pair_of(weights + h * kChunk + r);
            for (int v = 0; v < Blocks; ++v) {
                sums[h][v][0] = _mm512_dpwssd_epi32(sums[h][v][0], low[v], pair);
                sums[h][v][1] = _mm512_dpwssd_epi32(sums[h][v][1], high[v], pair);
            }
        }
    }
    const __m512i first = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11), second = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
    for (int h = 0; h < Heads; ++h)
        for (int v = 0; v < Blocks; ++v) {
            int32_t* to = out + h * dim + 32 * v;
            const __m512i front = _mm512_permutex2var_epi64(sums[h][v][0], first, sums[h][v][1]);
            _mm512_storeu_si512(to, _mm512_add_epi32(_mm512_loadu_si512(to), front));
            if (!Whole) continue;
            const __m512i back = _mm512_permutex2var_epi64(sums[h][v][0], second, sums[h][v][1]);
            _mm512_storeu_si512(to + 16, _mm512_add_epi32(_mm512_loadu_si512(to + 16), back));
        }
}

template <int Heads>
static void mix_heads(const int8_t* values, int64_t stride, size_t n, size_t dim, const int16_t* weights, int32_t* out, int cache) {
    Coming coming{values + static_cast<int64_t>(rows_ahead(dim)) * stride, stride, dim, 0, cache};
    const int lines = !cache ? 0 : dim % 64 ? 2 : 1;  // one for each 32 elements of two rows reaches all lines of whole ones
    constexpr int blocks = Heads <= 4 ? 2 : 1;
    size_t d = 0;
    for (; d + 32 * blocks <= dim; d += 32 * blocks) mix_tile<Heads, blocks, true>(values + d, stride, n, dim, weights, out + d, coming, blocks * lines);
    for (; d + 32 <= dim; d += 32) mix_tile<Heads, 1, true>(values + d, stride, n, dim, weights, out + d, coming, lines);
    if (d < dim) mix_tile<Heads, 1, false>(values + d, stride, n, dim, weights, out + d, coming, lines);
}

void mix_bytes(const int8_t* values, int64_t stride, size_t n, size_t dim, const int16_t* weights, size_t heads, int32_t* out, int cache) {
    const size_t tile = rows_ahead(dim);
    for (size_t at = 0; at < n; at += tile) {
        const size_t rows = n - at < tile ? n - at : tile;
        const int8_t* here = values + static_cast<int64_t>(at) * stride;
        const auto mix_some = [&](auto mixes, size_t h) {
            mixes(here, stride, rows, dim, weights + h * kChunk + at, out + h * dim, h == 0 ? cache : 0);
        };
        size_t h = 0;
        for (; h + 8 <= heads; h += 8) mix_some(mix_heads<8>, h);
        for (; h + 4 <= heads; h += 4) mix_some(mix_heads<4>, h);
        for (; h < heads; ++h) mix_some(mix_heads<1>, h);
    }
}

}  // namespace

#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

Kernels vnni_kernels(bool takes_512_bits_whole) {
    Kernels found = avx512_kernels(takes_512_bits_whole);
    found.products.several[0] = takes_512_bits_whole ? several_int8<First> : several_int8<Second>;
    found.products.several[1] = takes_512_bits_whole ? several_int4<First> : several_int4<Second>;
    found.products.integers[1] = takes_512_bits_whole ? dot_int4<First> : dot_int4<Second>;
    found.products.arrange[1] = arrange_int4;
    found.attention.score_bytes = score_bytes;
    found.attention.mix_bytes = mix_bytes;
    return found;
}

#endif
