// Dot products of kStreams rows of a weight with a vector, once per instruction set; included by kernels.inl. They are bound by the
// memory that rows are read from: rows far apart are read side by side, because a processor keeps several streams coming faster
// than one (Zen 3, other work on the second core: 14 GB/s in eight, 7 to 12 in one), and the aim is few operations per byte.
//
// Floats are summed in 8 lanes; integers exactly in 8 lanes per group, which are scaled and summed in 8 lanes of floats: the same
// bits on every instruction set. Vectors beside integers have 15 bits and a scale per group, far finer than the weights; `arrange`
// puts them where the loops want them. bfloat16 is read two elements a word, the even ones by a shift and the odd ones by a mask,
// beside a vector in that order.

typedef float Floats8 __attribute__((vector_size(32), aligned(4), may_alias));
typedef uint32_t Words8 __attribute__((vector_size(32), aligned(4), may_alias));
typedef int32_t Ints8 __attribute__((vector_size(32), aligned(4), may_alias));

#ifdef __clang__
#define DS_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define DS_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (Ints8){__VA_ARGS__})
#endif

// sums[i] = the 8 lanes of v[i], ((0+4) + (2+6)) + ((1+5) + (3+7)), for 8 vectors.
static inline __attribute__((always_inline)) void sum_lanes(const Floats8* v, float* sums) {
    Floats8 half[4], quarter[2];
    for (int i = 0; i < 4; ++i)
        half[i] = DS_SHUFFLE(v[2 * i], v[2 * i + 1], 0, 1, 2, 3, 8, 9, 10, 11) +
                  DS_SHUFFLE(v[2 * i], v[2 * i + 1], 4, 5, 6, 7, 12, 13, 14, 15);
    for (int i = 0; i < 2; ++i)
        quarter[i] = DS_SHUFFLE(half[2 * i], half[2 * i + 1], 0, 1, 8, 9, 4, 5, 12, 13) +
                     DS_SHUFFLE(half[2 * i], half[2 * i + 1], 2, 3, 10, 11, 6, 7, 14, 15);
    const Floats8 mixed = DS_SHUFFLE(quarter[0], quarter[1], 0, 2, 8, 10, 4, 6, 12, 14) +
                          DS_SHUFFLE(quarter[0], quarter[1], 1, 3, 9, 11, 5, 7, 13, 15);
    *reinterpret_cast<Floats8*>(sums) = DS_SHUFFLE(mixed, mixed, 0, 4, 1, 5, 2, 6, 3, 7);
}

static void dot_fp32(const void* const* rows, const float* x, size_t n, float* out) {
    const float* const* w = reinterpret_cast<const float* const*>(rows);
    Floats8 sums[kStreams] = {};
    size_t i = 0;
    for (; i + 16 <= n; i += 16)
        for (int k = 0; k < kStreams; ++k) {
            sums[k] += *reinterpret_cast<const Floats8*>(w[k] + i) * *reinterpret_cast<const Floats8*>(x + i);
            sums[k] += *reinterpret_cast<const Floats8*>(w[k] + i + 8) * *reinterpret_cast<const Floats8*>(x + i + 8);
        }
    sum_lanes(sums, out);
    for (; i < n; ++i)
        for (int k = 0; k < kStreams; ++k) out[k] += w[k][i] * x[i];
}

static void dot_bf16(const void* const* rows, const float* x, size_t n, float* out) {
    const uint16_t* const* w = reinterpret_cast<const uint16_t* const*>(rows);
    Floats8 sums[kStreams] = {};
    size_t i = 0;
    for (; i + 16 <= n; i += 16)
        for (int k = 0; k < kStreams; ++k) {
            const Words8 both = *reinterpret_cast<const Words8*>(w[k] + i);
            sums[k] += (Floats8)(both << 16) * *reinterpret_cast<const Floats8*>(x + i);
            sums[k] += (Floats8)(both & 0xffff0000u) * *reinterpret_cast<const Floats8*>(x + i + 8);
        }
    sum_lanes(sums, out);
    for (; i < n; ++i)
        for (int k = 0; k < kStreams; ++k) out[k] += float_of(static_cast<uint32_t>(w[k][i]) << 16) * x[i];
}

constexpr size_t kGroups = 8;   // whose scales are multiplied at once
constexpr size_t kAhead = 512;  // bytes ahead they are asked for: the next row of a stream follows on this one

// Groups [g, g + count) of all rows, which meet a piece of x while it is in registers.
struct Groups8 {
    const IntegerRows& rows;
    const Integers& x;
    size_t g, count;
    const float (*scales)[kGroups];  // of both, [kStreams]
    Floats8* lanes;                  // [kStreams], added to
};

template <void (*groups_of)(const Groups8&)>
static inline __attribute__((always_inline)) void sum_groups(const IntegerRows& rows, const Integers& x, float* out) {
    Floats8 lanes[kStreams] = {};
    alignas(32) float scales[kStreams][kGroups];
    for (size_t g = 0; g < x.num_groups; g += kGroups) {
        const size_t count = x.num_groups - g < kGroups ? x.num_groups - g : kGroups;
        for (int k = 0; k < kStreams; ++k) {
            __builtin_prefetch(rows.scales[k] + g + 2 * kGroups);
            if (count == kGroups)
                *reinterpret_cast<Floats8*>(scales[k]) =
                    *reinterpret_cast<const Floats8*>(rows.scales[k] + g) * *reinterpret_cast<const Floats8*>(x.scales + g);
            else
                for (size_t j = 0; j < count; ++j) scales[k][j] = rows.scales[k][g + j] * x.scales[g + j];
        }
        groups_of(Groups8{rows, x, g, count, scales, lanes});
    }
    sum_lanes(lanes, out);
}

static void arrange_int8(const int16_t* q, size_t n, size_t, int16_t* to) { std::memcpy(to, q, n * sizeof *q); }

// Four planes for each 64 elements, or what is left of a group: of the elements 4i, 4i + 1, 4i + 2, 4i + 3.
static void arrange_int4(const int16_t* q, size_t n, size_t group_size, int16_t* to) {
    for (size_t group = 0; group < n; group += group_size)
        for (size_t at = 0; at < group_size; at += 64) {
            const size_t block = group_size - at < 64 ? group_size - at : 64;
            for (size_t i = 0; i < block; ++i) to[group + at + i % 4 * (block / 4) + i / 4] = q[group + at + i];
        }
}

#ifdef DS_HAS_AVX2

static inline __m256i load_words(const void* at) { return _mm256_loadu_si256(static_cast<const __m256i*>(at)); }
static inline __m256i load_half(const void* at) {
    return _mm256_zextsi128_si256(_mm_loadu_si128(static_cast<const __m128i*>(at)));
}
static inline __m256i load_bytes(const void* at) { return _mm256_cvtepi8_epi16(_mm_loadu_si128(static_cast<const __m128i*>(at))); }

static inline __attribute__((always_inline)) void add_scaled(__m256i lanes, const float* scale, Floats8* to) {
    *to += (Floats8)_mm256_mul_ps(_mm256_cvtepi32_ps(lanes), _mm256_broadcast_ss(scale));
}

template <size_t Size>
static inline __attribute__((always_inline)) void groups_int8(const Groups8& of) {
    const size_t size = Size ? Size : of.x.group_size;
    Floats8 sums[kStreams];
    const uint8_t* w[kStreams];
    for (int k = 0; k < kStreams; ++k) sums[k] = of.lanes[k], w[k] = of.rows.values[k] + of.g * size;
    const int16_t* x = of.x.values + of.g * size;
    for (size_t j = 0; j < of.count; ++j, x += size) {
        __m256i lanes[kStreams];
        for (int k = 0; k < kStreams; ++k) lanes[k] = _mm256_setzero_si256();
        for (size_t i = 0; i < size; i += 32) {
            const __m256i x0 = load_words(x + i), x1 = load_words(x + i + 16);
            for (int k = 0; k < kStreams; ++k) {
                const uint8_t* at = w[k] + j * size + i;
                if (i % 64 == 0) __builtin_prefetch(at + kAhead);
                const __m256i both = _mm256_add_epi32(_mm256_madd_epi16(load_bytes(at), x0), _mm256_madd_epi16(load_bytes(at + 16), x1));
                lanes[k] = _mm256_add_epi32(lanes[k], both);
            }
        }
        for (int k = 0; k < kStreams; ++k) add_scaled(lanes[k], of.scales[k] + j, sums + k);
    }
    for (int k = 0; k < kStreams; ++k) of.lanes[k] = sums[k];
}

// Weights are unsigned, 8 above their value; each is masked out of its word of four.
static inline __attribute__((always_inline)) __m256i four_bits(__m256i words, const __m256i* x) {
    const __m256i low = _mm256_set1_epi16(15);
    const __m256i a = _mm256_madd_epi16(_mm256_and_si256(words, low), x[0]);
    const __m256i b = _mm256_madd_epi16(_mm256_and_si256(_mm256_srli_epi16(words, 4), low), x[1]);
    const __m256i c = _mm256_madd_epi16(_mm256_and_si256(_mm256_srli_epi16(words, 8), low), x[2]);
    const __m256i d = _mm256_madd_epi16(_mm256_srli_epi16(words, 12), x[3]);
    return _mm256_add_epi32(_mm256_add_epi32(a, b), _mm256_add_epi32(c, d));
}

template <size_t Size>
static inline __attribute__((always_inline)) void groups_int4(const Groups8& of) {
    const size_t size = Size ? Size : of.x.group_size;
    Floats8 sums[kStreams];
    const uint8_t* w[kStreams];
    for (int k = 0; k < kStreams; ++k) sums[k] = of.lanes[k], w[k] = of.rows.values[k] + of.g * size / 2;
    const int16_t* x = of.x.values + of.g * size;
    for (size_t j = 0; j < of.count; ++j, x += size) {
        const __m256i start = _mm256_zextsi128_si256(_mm_cvtsi32_si128(of.x.starts[of.g + j]));
        __m256i lanes[kStreams], planes[4];
        for (int k = 0; k < kStreams; ++k) lanes[k] = start;
        for (size_t i = 0; i < size / 64 * 64; i += 64) {
            for (int p = 0; p < 4; ++p) planes[p] = load_words(x + i + 16 * p);
            for (int k = 0; k < kStreams; ++k) {
                const uint8_t* at = w[k] + (j * size + i) / 2;
                if (j % 2 == 0) __builtin_prefetch(at + kAhead);
                lanes[k] = _mm256_add_epi32(lanes[k], four_bits(load_words(at), planes));
            }
        }
        if (size % 64) {
            const size_t i = size / 64 * 64;
            for (int p = 0; p < 4; ++p) planes[p] = load_half(x + i + 8 * p);
            for (int k = 0; k < kStreams; ++k)
                lanes[k] = _mm256_add_epi32(lanes[k], four_bits(load_half(w[k] + (j * size + i) / 2), planes));
        }
        for (int k = 0; k < kStreams; ++k) add_scaled(lanes[k], of.scales[k] + j, sums + k);
    }
    for (int k = 0; k < kStreams; ++k) of.lanes[k] = sums[k];
}

#else

// The lanes of one group of row k, scaled, onto those of the row.
static inline void add_scaled(const Groups8& of, int k, size_t j, const int32_t* lanes) {
    for (size_t t = 0; t < 8; ++t) of.lanes[k][t] += static_cast<float>(lanes[t]) * of.scales[k][j];
}

template <size_t>
static void groups_int8(const Groups8& of) {
    const size_t size = of.x.group_size;
    for (int k = 0; k < kStreams; ++k)
        for (size_t j = 0; j < of.count; ++j) {
            const int8_t* w = reinterpret_cast<const int8_t*>(of.rows.values[k]) + (of.g + j) * size;
            const int16_t* x = of.x.values + (of.g + j) * size;
            int32_t lanes[8] = {};
            for (size_t i = 0; i < size; i += 16)
                for (size_t t = 0; t < 8; ++t) lanes[t] += w[i + 2 * t] * x[i + 2 * t] + w[i + 2 * t + 1] * x[i + 2 * t + 1];
            add_scaled(of, k, j, lanes);
        }
}

template <size_t>
static void groups_int4(const Groups8& of) {
    const size_t size = of.x.group_size;
    for (int k = 0; k < kStreams; ++k)
        for (size_t j = 0; j < of.count; ++j) {
            const uint8_t* w = of.rows.values[k] + (of.g + j) * size / 2;
            const int16_t* x = of.x.values + (of.g + j) * size;
            int32_t lanes[8] = {of.x.starts[of.g + j]};
            for (size_t i = 0; i < size; i += 64) {
                const size_t words = (size - i < 64 ? size - i : 64) / 4;  // of each plane
                for (size_t u = 0; u < words; ++u) {
                    const int first = w[i / 2 + 2 * u], second = w[i / 2 + 2 * u + 1];
                    lanes[u / 2] += (first & 15) * x[i + u] + (first >> 4) * x[i + words + u] + (second & 15) * x[i + 2 * words + u] +
                                    (second >> 4) * x[i + 3 * words + u];
                }
            }
            add_scaled(of, k, j, lanes);
        }
}

#endif

static void dot_int8(const IntegerRows& rows, const Integers& x, float* out) {
    (x.group_size == 64 ? sum_groups<groups_int8<64>> : sum_groups<groups_int8<0>>)(rows, x, out);
}

static void dot_int4(const IntegerRows& rows, const Integers& x, float* out) {
    (x.group_size == 64 ? sum_groups<groups_int4<64>> : sum_groups<groups_int4<0>>)(rows, x, out);
}

// The sum of 64-bit words, read in `streams` places at once: what a product's speed is compared with.
static uint64_t read_words(const uint64_t* words, size_t n, size_t streams) {
    typedef uint64_t Longs4 __attribute__((vector_size(32), aligned(8), may_alias));
    Longs4 a = {}, b = {};
    const size_t part = n / streams / 8 * 8;
    for (size_t i = 0; i < part; i += 8)
        for (size_t s = 0; s < streams; ++s) {
            const uint64_t* at = words + s * part + i;
            if (streams == 1) __builtin_prefetch(at + 256);
            a += *reinterpret_cast<const Longs4*>(at);
            b += *reinterpret_cast<const Longs4*>(at + 4);
        }
    const Longs4 c = a + b;
    return (c[0] + c[1]) + (c[2] + c[3]);
}
