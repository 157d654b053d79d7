// Dot products of kStreams rows of a weight with a vector, once per instruction set; included by kernels.inl. They are bound by the
// memory that rows are read from: rows far apart are read side by side, because a processor keeps several streams coming faster
// than one (Zen 3: 27 GB/s in four or eight, 15 in one), and the aim is few operations per byte.
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

constexpr size_t kAhead = 256;  // bytes ahead rows are asked for: the next row of a stream follows on this one

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
    const auto add = [&](int k, size_t at) {
        const Words8 both = *reinterpret_cast<const Words8*>(w[k] + at);
        sums[k] += (Floats8)(both << 16) * *reinterpret_cast<const Floats8*>(x + at);
        sums[k] += (Floats8)(both & 0xffff0000u) * *reinterpret_cast<const Floats8*>(x + at + 8);
    };
    for (; i + 32 <= n; i += 32)
        for (int k = 0; k < kStreams; ++k) {
            __builtin_prefetch(reinterpret_cast<const char*>(w[k] + i) + kAhead);
            add(k, i);
            add(k, i + 16);
        }
    for (; i + 16 <= n; i += 16)
        for (int k = 0; k < kStreams; ++k) add(k, i);
    sum_lanes(sums, out);
    for (; i < n; ++i)
        for (int k = 0; k < kStreams; ++k) out[k] += float_of(static_cast<uint32_t>(w[k][i]) << 16) * x[i];
}

constexpr int kRows = 4;  // rows of integers that are worked on at once: what is under way for them fits in 16 registers

// lanes [kRows] of rows [first, first + kRows) with x: exact sums of each group, scaled by both scales and summed in floats.
using SumRows = void (*)(const IntegerRows& rows, const Integers& x, int first, Floats8* lanes);

template <SumRows sum_rows>
static inline __attribute__((always_inline)) void dot_integers(const IntegerRows& rows, const Integers& x, float* out) {
    Floats8 lanes[kStreams];
    for (int first = 0; first < kStreams; first += kRows) sum_rows(rows, x, first, lanes + first);
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

static inline __attribute__((always_inline)) Floats8 scaled(__m256i lanes, float scale) {
    return (Floats8)_mm256_mul_ps(_mm256_cvtepi32_ps(lanes), _mm256_set1_ps(scale));
}

// The exact products of a group of a row with its piece of x, in 8 lanes.
template <size_t Size>
static inline __attribute__((always_inline)) __m256i group_int8(const uint8_t* w, const int16_t* x, size_t any, __m256i lanes) {
    const size_t size = Size ? Size : any;
    for (size_t i = 0; i < size; i += 32) {
        const __m256i a = _mm256_madd_epi16(load_bytes(w + i), load_words(x + i));
        const __m256i b = _mm256_madd_epi16(load_bytes(w + i + 16), load_words(x + i + 16));
        lanes = _mm256_add_epi32(lanes, _mm256_add_epi32(a, b));
    }
    return lanes;
}

// Weights are unsigned, 8 above their value; each is masked out of its word of four. x: four planes.
template <size_t Size>
static inline __attribute__((always_inline)) __m256i group_int4(const uint8_t* w, const int16_t* x, size_t any, __m256i lanes) {
    const size_t size = Size ? Size : any;
    const __m256i low = _mm256_set1_epi16(15);
    for (size_t i = 0; i < size; i += 64) {
        const bool is_whole = size - i >= 64;
        const __m256i words = is_whole ? load_words(w + i / 2) : load_half(w + i / 2);
        const auto of = [&](int p) { return is_whole ? load_words(x + i + 16 * p) : load_half(x + i + 8 * p); };
        const __m256i a = _mm256_madd_epi16(_mm256_and_si256(words, low), of(0));
        const __m256i b = _mm256_madd_epi16(_mm256_and_si256(_mm256_srli_epi16(words, 4), low), of(1));
        const __m256i c = _mm256_madd_epi16(_mm256_and_si256(_mm256_srli_epi16(words, 8), low), of(2));
        const __m256i d = _mm256_madd_epi16(_mm256_srli_epi16(words, 12), of(3));
        lanes = _mm256_add_epi32(lanes, _mm256_add_epi32(_mm256_add_epi32(a, b), _mm256_add_epi32(c, d)));
    }
    return lanes;
}

template <size_t Size, int PerByte, __m256i (*group)(const uint8_t*, const int16_t*, size_t, __m256i)>
static void sum_rows(const IntegerRows& rows, const Integers& beside, int first, Floats8* lanes) {
    const size_t size = Size ? Size : beside.group_size, step = size / PerByte;
    const uint8_t* const* const w = rows.values + first;
    const float* const* const s = rows.scales + first;
    const uint8_t *w0 = w[0], *w1 = w[1], *w2 = w[2], *w3 = w[3];
    const float *s0 = s[0], *s1 = s[1], *s2 = s[2], *s3 = s[3];
    Floats8 sum0 = {}, sum1 = {}, sum2 = {}, sum3 = {};  // no arrays: they stay in registers
    const int16_t* x = beside.values;
    for (size_t g = 0; g < beside.num_groups; ++g) {
        const __m256i start = _mm256_zextsi128_si256(_mm_cvtsi32_si128(beside.starts[g]));
        const float scale = beside.scales[g];
        for (size_t i = 0; i < step; i += 64) {
            __builtin_prefetch(w0 + kAhead + i);
            __builtin_prefetch(w1 + kAhead + i);
            __builtin_prefetch(w2 + kAhead + i);
            __builtin_prefetch(w3 + kAhead + i);
        }
        sum0 += scaled(group(w0, x, size, start), s0[g] * scale);
        sum1 += scaled(group(w1, x, size, start), s1[g] * scale);
        sum2 += scaled(group(w2, x, size, start), s2[g] * scale);
        sum3 += scaled(group(w3, x, size, start), s3[g] * scale);
        x += size, w0 += step, w1 += step, w2 += step, w3 += step;
    }
    lanes[0] = sum0, lanes[1] = sum1, lanes[2] = sum2, lanes[3] = sum3;
}

template <size_t Size>
constexpr SumRows rows_int8 = sum_rows<Size, 1, group_int8<Size>>;
template <size_t Size>
constexpr SumRows rows_int4 = sum_rows<Size, 2, group_int4<Size>>;

#else

static inline void group_int8(const uint8_t* bytes, const int16_t* x, size_t size, int32_t* lanes) {
    const int8_t* w = reinterpret_cast<const int8_t*>(bytes);
    for (size_t i = 0; i < size; i += 16)
        for (size_t t = 0; t < 8; ++t) lanes[t] += w[i + 2 * t] * x[i + 2 * t] + w[i + 2 * t + 1] * x[i + 2 * t + 1];
}

static inline void group_int4(const uint8_t* w, const int16_t* x, size_t size, int32_t* lanes) {
    for (size_t i = 0; i < size; i += 64) {
        const size_t words = (size - i < 64 ? size - i : 64) / 4;  // of each plane
        for (size_t u = 0; u < words; ++u) {
            const int first = w[i / 2 + 2 * u], second = w[i / 2 + 2 * u + 1];
            lanes[u / 2] += (first & 15) * x[i + u] + (first >> 4) * x[i + words + u] + (second & 15) * x[i + 2 * words + u] +
                            (second >> 4) * x[i + 3 * words + u];
        }
    }
}

template <int PerByte, void (*group)(const uint8_t*, const int16_t*, size_t, int32_t*)>
static void sum_rows(const IntegerRows& rows, const Integers& beside, int first, Floats8* to) {
    for (int k = 0; k < kRows; ++k) {
        to[k] = Floats8{};
        for (size_t g = 0; g < beside.num_groups; ++g) {
            const size_t at = g * beside.group_size;
            int32_t lanes[8] = {beside.starts[g]};
            group(rows.values[first + k] + at / PerByte, beside.values + at, beside.group_size, lanes);
            const float scale = rows.scales[first + k][g] * beside.scales[g];
            for (size_t t = 0; t < 8; ++t) to[k][t] += static_cast<float>(lanes[t]) * scale;
        }
    }
}

template <size_t>
constexpr SumRows rows_int8 = sum_rows<1, group_int8>;
template <size_t>
constexpr SumRows rows_int4 = sum_rows<2, group_int4>;

#endif

static void dot_int8(const IntegerRows& rows, const Integers& x, float* out) {
    (x.group_size == 64 ? dot_integers<rows_int8<64>> : dot_integers<rows_int8<0>>)(rows, x, out);
}

static void dot_int4(const IntegerRows& rows, const Integers& x, float* out) {
    (x.group_size == 64 ? dot_integers<rows_int4<64>> : dot_integers<rows_int4<0>>)(rows, x, out);
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
