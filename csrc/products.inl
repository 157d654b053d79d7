// Dot products of kStreams rows of a weight with a vector, once per instruction set; included by kernels.inl. They are bound by the
// memory that rows are read from: rows far apart are read side by side, because a processor keeps several streams coming faster
// than one (Zen 3: 27 GB/s in four or eight, 15 in one), and the aim is few operations per byte.
//
// Floats are summed in 16 lanes; integers exactly in 8 lanes per group (one of int4 in groups of 64, see `sum_eights`), which are scaled
// and summed in lanes of floats: the same bits on every instruction set. Vectors beside integers have 15 bits and a scale per group,
// far finer than the weights; `arrange` puts them where the loops want them. bfloat16 is read two elements a word, the even ones by a
// shift and the odd ones by a mask, beside a vector in that order, kParted elements at a time.

// How rows are asked for: those of a weight in a cache never, others for the second-level cache or, where it has 48 KB, for the first.
using Never = Asks<0, 2>;
using Second = Asks<2048, 2>;
// Zen 5, widths of 2,048 to 11,008: int8 at 90 to 95 % of the bandwidth, 80 to 93 from the second cache; bf16 at 83 to 91 for 66 to 80;
// int4 at 81 to 98 for 66 to 92.
using First = Asks<2048, 1>;
#ifdef DS_HAS_AVX2
using Soon = Asks<1024, 2>;  // rows of floats, where they take few operations (Zen 4: bf16 at 88 % of the bandwidth, 75 twice as far)
#else
using Soon = Second;
#endif

constexpr size_t kWide = 4096;  // elements: 16 KB of x (Zen 4: 11,008 at 69 % of the bandwidth, 84 so; 3,072 at 72, 64 so)

// Rows that are worked on together, in as many places of memory: as many as registers hold what is under way for.
constexpr int kRows = 4;

// Rows of x that a weight meets while it is in registers, where there are 32 of those.
constexpr int kBeside = kWidth == 16 ? 4 : 1;

// x [Batch, n], out [Batch, kStreams].
template <class Ask, int Rows, int Batch>
static void dot_fp32_of(const void* const* rows, const float* x, size_t n, float* out) {
    const float* const* w = reinterpret_cast<const float* const*>(rows);
    Floats8 sums[Batch][kStreams];
    const size_t whole = n / 16 * 16;
    for (int first = 0; first < kStreams; first += Rows) {
        Sixteen under_way[Batch][Rows] = {};
        for (size_t i = 0; i < whole; i += 16)
            for (int k = 0; k < Rows; ++k) {
                const float* at = w[first + k] + i;
                Ask::ahead_of(at);
                const Sixteen piece = ReadFloats::read(at);
                for (int b = 0; b < Batch; ++b) under_way[b][k] += product(piece, x + b * n + i);
            }
        for (int b = 0; b < Batch; ++b)
            for (int k = 0; k < Rows; ++k) fold(under_way[b][k], &sums[b][first + k]);
    }
    for (int b = 0; b < Batch; ++b, x += n, out += kStreams) {
        sum_lanes(sums[b], out);
        for (size_t i = whole; i < n; ++i)
            for (int k = 0; k < kStreams; ++k) out[k] += w[k][i] * x[i];
    }
}

// The rows of x [batch, n], as many together as a block takes: each has the sums that it has alone.
using Dot = void (*)(const void* const* rows, const float* x, size_t n, float* out);
template <Dot many, Dot two, Dot one>
static inline void dot_blocks(const void* const* rows, const float* x, size_t n, size_t batch, float* out) {
    size_t b = 0;
    for (; b + kBeside <= batch; b += kBeside) many(rows, x + b * n, n, out + b * kStreams);
    for (; kBeside > 2 && b + 2 <= batch; b += 2) two(rows, x + b * n, n, out + b * kStreams);
    for (; b < batch; ++b) one(rows, x + b * n, n, out + b * kStreams);
}

template <class Ask>
static void dot_fp32(const void* const* rows, const float* x, size_t n, size_t batch, float* out) {
    dot_blocks<dot_fp32_of<Ask, kRows, kBeside>, dot_fp32_of<Ask, kRows, 2>, dot_fp32_of<Ask, kRows, 1>>(rows, x, n, batch, out);
}

// The products of kParted elements of bfloat16 with each row of x, in its order.
template <int Rows, int Batch>
static inline __attribute__((always_inline)) void add_parted(const uint16_t* at, const float* x, size_t n, int k, Sixteen (&sums)[Batch][Rows]) {
#ifdef DS_HAS_AVX512
    const Words both = *reinterpret_cast<const Words*>(at);
    const Sixteen even = (Floats)(both << 16), odd = (Floats)(both & 0xffff0000u);
#else
    const Words8 low = *reinterpret_cast<const Words8*>(at), high = *reinterpret_cast<const Words8*>(at + 16);
    const Sixteen even = {(Floats8)(low << 16), (Floats8)(high << 16)};
    const Sixteen odd = {(Floats8)(low & 0xffff0000u), (Floats8)(high & 0xffff0000u)};
#endif
    for (int b = 0; b < Batch; ++b) {
        sums[b][k] += product(even, x + b * n);
        sums[b][k] += product(odd, x + b * n + 16);
    }
}

template <class Ask, int Rows, int Batch>
static void dot_bf16_of(const void* const* rows, const float* x, size_t n, float* out) {
    const uint16_t* const* w = reinterpret_cast<const uint16_t* const*>(rows);
    Floats8 sums[Batch][kStreams];
    const size_t whole = n / kParted * kParted;
    for (int first = 0; first < kStreams; first += Rows) {
        Sixteen under_way[Batch][Rows] = {};
        for (size_t i = 0; i < whole; i += kParted)
            for (int k = 0; k < Rows; ++k) {
                const uint16_t* at = w[first + k] + i;
                Ask::ahead_of(at);
                add_parted(at, x + i, n, k, under_way);
            }
        for (int b = 0; b < Batch; ++b)
            for (int k = 0; k < Rows; ++k) fold(under_way[b][k], &sums[b][first + k]);
    }
    for (int b = 0; b < Batch; ++b, x += n, out += kStreams) {
        sum_lanes(sums[b], out);
        for (size_t i = whole; i < n; ++i)
            for (int k = 0; k < kStreams; ++k) out[k] += float_of(static_cast<uint32_t>(w[k][i]) << 16) * x[i];
    }
}

// A wide x does not stay in a small first-level cache: it is read once for all rows where registers hold their sums.
template <class Ask>
static void dot_bf16(const void* const* rows, const float* x, size_t n, size_t batch, float* out) {
    constexpr int all = kWidth == 16 && Ask::kCache == 2 ? kStreams : kRows;
    (n >= kWide ? dot_blocks<dot_bf16_of<Ask, kRows, kBeside>, dot_bf16_of<Ask, kRows, 2>, dot_bf16_of<Ask, all, 1>>
                : dot_blocks<dot_bf16_of<Ask, kRows, kBeside>, dot_bf16_of<Ask, kRows, 2>, dot_bf16_of<Ask, kRows, 1>>)(rows, x, n, batch, out);
}

// lanes [kRows] of rows [first, first + kRows) with x: exact sums of each group, scaled by both scales and summed in floats.
using SumRows = void (*)(const IntegerRows& rows, const Integers& x, int first, Floats8* lanes);

template <SumRows sum_rows>
static inline __attribute__((always_inline)) void dot_integers(const IntegerRows& rows, const Integers& x, float* out) {
    Floats8 lanes[kStreams];
    for (int first = 0; first < kStreams; first += kRows) sum_rows(rows, x, first, lanes + first);
    sum_lanes(lanes, out);
}

static void arrange_int8(const int16_t* q, size_t n, size_t, int16_t* to) { std::memcpy(to, q, n * sizeof *q); }

#ifdef DS_HAS_AVX2

static inline __m256i load_words(const void* at) { return _mm256_loadu_si256(static_cast<const __m256i*>(at)); }

// Of words x = 256 high + low with a signed low byte: high.
static inline __m256i high_byte(__m256i x) {
    return _mm256_srai_epi16(_mm256_sub_epi16(x, _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8)), 8);
}

// The low bytes of 32 words.
static inline __m256i low_bytes(__m256i a, __m256i b) {
    const __m256i byte = _mm256_set1_epi16(255);
    return _mm256_permute4x64_epi64(_mm256_packus_epi16(_mm256_and_si256(a, byte), _mm256_and_si256(b, byte)), 0xd8);
}

// The even ones of 32 bytes, and the odd ones.
static inline void store_parted(__m256i bytes, int8_t* even, int8_t* odd) {
    const __m256i none = _mm256_setzero_si256();
    const __m256i evens = low_bytes(bytes, none), odds = low_bytes(_mm256_srli_epi16(bytes, 8), none);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(even), _mm256_castsi256_si128(evens));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(odd), _mm256_castsi256_si128(odds));
}

// The planes of 2 * half elements: the even ones' low bytes, signed, and their high ones, then those of the odd ones. x = 256 high + low.
static inline void store_planes(const int16_t* q, size_t half, int8_t* planes) {
    for (size_t i = 0; i < half; i += 16, planes += 16) {
        const __m256i first = load_words(q + 2 * i), second = load_words(q + 2 * i + 16);
        store_parted(low_bytes(first, second), planes, planes + 2 * half);
        store_parted(low_bytes(high_byte(first), high_byte(second)), planes + half, planes + 3 * half);
    }
}

// Groups of 64 by twos, as `sum_two` meets them: the planes of the first halves of 16 bytes, then of the second ones. Other groups have the
// planes of each 64 elements, or of the 32 that a group ends with.
static void arrange_int4(const int16_t* q, size_t n, size_t group_size, int16_t* to) {
    int8_t* const planes = reinterpret_cast<int8_t*>(to);
    for (size_t at = 0; group_size == 64 && at < n; at += 128) {
        alignas(32) int8_t found[2][4][32] = {};
        for (size_t i = 0; i < 2 && at + 64 * i < n; ++i) store_planes(q + at + 64 * i, 32, found[i][0]);
        for (size_t p = 0; p < 4; ++p) {
            const __m256i first = load_words(found[0][p]), second = load_words(found[1][p]);
            __m256i* const place = reinterpret_cast<__m256i*>(planes + 2 * at + 32 * p);
            _mm256_storeu_si256(place, _mm256_unpacklo_epi64(first, second));
            _mm256_storeu_si256(place + 4, _mm256_unpackhi_epi64(first, second));
        }
    }
    for (size_t group = 0; group_size != 64 && group < n; group += group_size)
        for (size_t at = 0; at < group_size; at += 64)
            store_planes(q + group + at, group_size - at < 64 ? 16 : 32, planes + 2 * (group + at));
}

static inline __m256i load_half(const void* at) {
    return _mm256_zextsi128_si256(_mm_loadu_si128(static_cast<const __m128i*>(at)));
}
static inline __m256i load_bytes(const void* at) { return _mm256_cvtepi8_epi16(_mm_loadu_si128(static_cast<const __m128i*>(at))); }

static inline __attribute__((always_inline)) Floats8 scaled(__m256i lanes, const float* own, __m256 scale) {
    return (Floats8)_mm256_mul_ps(_mm256_cvtepi32_ps(lanes), _mm256_mul_ps(_mm256_broadcast_ss(own), scale));
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

// Weights are unsigned, 8 above their value, and meet the bytes of x; a word holds four products.
template <size_t Size>
static inline __attribute__((always_inline)) __m256i group_int4(const uint8_t* w, const int16_t* x, size_t any, __m256i lanes) {
    const size_t size = Size ? Size : any;
    const __m256i nibble = _mm256_set1_epi8(15);
    for (size_t i = 0; i < size; i += 64) {
        const bool is_whole = size - i >= 64;
        const __m256i words = is_whole ? load_words(w + i / 2) : load_half(w + i / 2);
        const auto of = [&](int p) { return is_whole ? load_words(x + i + 16 * p) : load_half(x + i + 8 * p); };
        const __m256i even = _mm256_and_si256(words, nibble), odd = _mm256_and_si256(_mm256_srli_epi16(words, 4), nibble);
        const __m256i low = _mm256_add_epi16(_mm256_maddubs_epi16(even, of(0)), _mm256_maddubs_epi16(odd, of(2)));
        const __m256i high = _mm256_add_epi16(_mm256_maddubs_epi16(even, of(1)), _mm256_maddubs_epi16(odd, of(3)));
        lanes = _mm256_add_epi32(lanes, _mm256_madd_epi16(low, _mm256_set1_epi16(1)));
        lanes = _mm256_add_epi32(lanes, _mm256_madd_epi16(high, _mm256_set1_epi16(256)));
    }
    return lanes;
}

template <class Ask, size_t Size, int PerByte, __m256i (*group)(const uint8_t*, const int16_t*, size_t, __m256i)>
static void sum_rows(const IntegerRows& rows, const Integers& beside, int first, Floats8* lanes) {
    const size_t size = Size ? Size : beside.group_size, step = size / PerByte;
    const uint8_t* const* const w = rows.values + first;
    const float* const* const s = rows.scales + first;
    const uint8_t *w0 = w[0], *w1 = w[1], *w2 = w[2], *w3 = w[3];
    const float *s0 = s[0], *s1 = s[1], *s2 = s[2], *s3 = s[3];
    Floats8 sum0 = {}, sum1 = {}, sum2 = {}, sum3 = {};  // no arrays: they stay in registers
    if (PerByte == 2) {
        const auto start = [&](const float* scales, Floats8* to) { sum_offsets(scales, beside, to); };
        start(s0, &sum0), start(s1, &sum1), start(s2, &sum2), start(s3, &sum3);
    }
    const int16_t* x = beside.values;
    for (size_t g = 0; g < beside.num_groups; ++g) {
        prefetch_scale(s0, g), prefetch_scale(s1, g), prefetch_scale(s2, g), prefetch_scale(s3, g);
        // Sums of int8 begin with their offset, 0: what GCC 12 makes of the loop without it reads slower (Zen 4: 85 % of the bandwidth for 94).
        const __m256i start = PerByte == 1 ? _mm256_zextsi128_si256(_mm_loadu_si32(beside.offsets + g)) : _mm256_setzero_si256();
        const __m256 scale = _mm256_set1_ps(beside.scales[g]);
        for (size_t i = 0; i < step; i += 64)
            Ask::ahead_of(w0 + i), Ask::ahead_of(w1 + i), Ask::ahead_of(w2 + i), Ask::ahead_of(w3 + i);
        sum0 += scaled(group(w0, x, size, start), s0 + g, scale);
        sum1 += scaled(group(w1, x, size, start), s1 + g, scale);
        sum2 += scaled(group(w2, x, size, start), s2 + g, scale);
        sum3 += scaled(group(w3, x, size, start), s3 + g, scale);
        x += size, w0 += step, w1 += step, w2 += step, w3 += step;
    }
    lanes[0] = sum0, lanes[1] = sum1, lanes[2] = sum2, lanes[3] = sum3;
}

template <class Ask, size_t Size>
constexpr SumRows rows_int8 = sum_rows<Ask, Size, 1, group_int8<Size>>;
template <class Ask>
constexpr SumRows rows_int4 = sum_rows<Ask, 0, 2, group_int4<0>>;

// The exact products of two groups of 64, 4 lanes each: first, second, first, second by twos.
static inline __attribute__((always_inline)) __m256i sum_two(__m256i first, __m256i second, const int16_t* x) {
    const __m256i nibble = _mm256_set1_epi8(15), front = _mm256_unpacklo_epi64(first, second), back = _mm256_unpackhi_epi64(first, second);
    const __m256i a = _mm256_and_si256(front, nibble), b = _mm256_and_si256(_mm256_srli_epi16(front, 4), nibble);
    const __m256i c = _mm256_and_si256(back, nibble), d = _mm256_and_si256(_mm256_srli_epi16(back, 4), nibble);
    const auto sum = [&](const int16_t* at) __attribute__((always_inline)) {
        const __m256i half = _mm256_add_epi16(_mm256_maddubs_epi16(a, load_words(at)), _mm256_maddubs_epi16(b, load_words(at + 32)));
        return _mm256_add_epi16(half, _mm256_add_epi16(_mm256_maddubs_epi16(c, load_words(at + 64)), _mm256_maddubs_epi16(d, load_words(at + 96))));
    };
    return _mm256_add_epi32(_mm256_madd_epi16(sum(x), _mm256_set1_epi16(1)), _mm256_madd_epi16(sum(x + 16), _mm256_set1_epi16(256)));
}

// Int4 in groups of 64, which are so small that to scale their lanes would take as long as the products do: each group is summed to one
// exact number, of which eight are scaled together.
template <class Ask>
static void sum_eights(const IntegerRows& rows, const Integers& beside, int first, Floats8* lanes) {
    const uint8_t* const* const w = rows.values + first;
    const float* const* const s = rows.scales + first;
    __m256 sums[kRows];
    for (int k = 0; k < kRows; ++k) sums[k] = _mm256_setzero_ps();
    const auto add = [&](int k, size_t g, size_t count, __m256 scales) __attribute__((always_inline)) {
        const __m256i none = _mm256_setzero_si256();
        const auto two = [&](size_t j) __attribute__((always_inline)) {
            const uint8_t* const at = w[k] + (g + j) * 32;
            return j < count ? sum_two(load_words(at), j + 1 < count ? load_words(at + 32) : none, beside.values + (g + j) * 64) : none;
        };
        const auto four = [&](size_t j) __attribute__((always_inline)) {
            const __m256 a = _mm256_castsi256_ps(two(j)), b = _mm256_castsi256_ps(two(j + 2));
            return _mm256_add_epi32(_mm256_castps_si256(_mm256_shuffle_ps(a, b, 0x88)), _mm256_castps_si256(_mm256_shuffle_ps(a, b, 0xdd)));
        };
        const __m256i a = four(0), b = 4 < count ? four(4) : none;
        const __m256i mixed = _mm256_add_epi32(_mm256_blend_epi32(a, b, 0xf0), _mm256_permute2x128_si256(a, b, 0x21));
        const __m256i exact = _mm256_add_epi32(mixed, load_words(beside.offsets + g));
        sums[k] = _mm256_add_ps(sums[k], _mm256_mul_ps(_mm256_cvtepi32_ps(exact), _mm256_mul_ps(scales, _mm256_loadu_ps(beside.scales + g))));
    };
    size_t g = 0;
    for (; g + 8 <= beside.num_groups; g += 8)
        for (int k = 0; k < kRows; ++k) {
            prefetch_scale(s[k], g);
            for (size_t line = 0; line < 256; line += 64) Ask::ahead_of(w[k] + g * 32 + line);
            add(k, g, 8, _mm256_loadu_ps(s[k] + g));
        }
    if (const size_t left = beside.num_groups - g) {
        const __m256i is_there = _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(left)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
        for (int k = 0; k < kRows; ++k) {
            for (size_t line = 0; line < left * 32; line += 64) Ask::ahead_of(w[k] + g * 32 + line);
            add(k, g, left, _mm256_maskload_ps(s[k] + g, is_there));
        }
    }
    for (int k = 0; k < kRows; ++k) lanes[k] = (Floats8)sums[k];
}

#else

// Four planes for each 64 elements, or what is left of a group: of the elements 4i, 4i + 1, 4i + 2, 4i + 3.
static void arrange_int4(const int16_t* q, size_t n, size_t group_size, int16_t* to) {
    for (size_t group = 0; group < n; group += group_size)
        for (size_t at = 0; at < group_size; at += 64) {
            const size_t block = group_size - at < 64 ? group_size - at : 64;
            for (size_t i = 0; i < block; ++i) to[group + at + i % 4 * (block / 4) + i / 4] = q[group + at + i];
        }
}

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
        if (PerByte == 2) sum_offsets(rows.scales[first + k], beside, &to[k]);
        for (size_t g = 0; g < beside.num_groups; ++g) {
            const size_t at = g * beside.group_size;
            int32_t lanes[8] = {};
            group(rows.values[first + k] + at / PerByte, beside.values + at, beside.group_size, lanes);
            const float scale = rows.scales[first + k][g] * beside.scales[g];
            for (size_t t = 0; t < 8; ++t) to[k][t] += static_cast<float>(lanes[t]) * scale;
        }
    }
}

template <class, size_t>
constexpr SumRows rows_int8 = sum_rows<1, group_int8>;
template <class>
constexpr SumRows rows_int4 = sum_rows<2, group_int4>;

template <class>
static void sum_eights(const IntegerRows& rows, const Integers& beside, int first, Floats8* to) {
    for (int k = 0; k < kRows; ++k) {
        to[k] = Floats8{};
        for (size_t g = 0; g < beside.num_groups; ++g) {
            int32_t lanes[8] = {}, exact = beside.offsets[g];
            group_int4(rows.values[first + k] + g * 32, beside.values + g * 64, 64, lanes);
            for (size_t t = 0; t < 8; ++t) exact += lanes[t];
            to[k][g % 8] += static_cast<float>(exact) * (rows.scales[first + k][g] * beside.scales[g]);
        }
    }
}

#endif

template <class Ask>
static void dot_int8(const IntegerRows& rows, const Integers& x, float* out) {
    (x.group_size == 64 ? dot_integers<rows_int8<Ask, 64>> : dot_integers<rows_int8<Ask, 0>>)(rows, x, out);
}

template <class Ask, class AskEights>
static void dot_int4(const IntegerRows& rows, const Integers& x, float* out) {
    (x.group_size == 64 ? dot_integers<sum_eights<AskEights>> : dot_integers<rows_int4<Ask>>)(rows, x, out);
}

// One row of x after the other.
template <void (*dot)(const IntegerRows& rows, const Integers& x, float* out)>
static void dot_each(const IntegerRows& rows, const Integers* x, size_t batch, float* out) {
    for (size_t b = 0; b < batch; ++b) dot(rows, x[b], out + b * kStreams);
}

// The sum of 64-bit words, read in `streams` places at once: what a product's speed is compared with.
static uint64_t read_words(const uint64_t* words, size_t n, size_t streams) {
    typedef uint64_t Longs4 __attribute__((vector_size(32), aligned(8), may_alias));
    Longs4 a = {}, b = {};
    const size_t part = n / streams / 8 * 8;
    for (size_t i = 0; i < part; i += 8)
        for (size_t s = 0; s < streams; ++s) {
            const uint64_t* at = words + s * part + i;
            if (streams < 8) __builtin_prefetch(at + 2048 / sizeof *at);
            a += *reinterpret_cast<const Longs4*>(at);
            b += *reinterpret_cast<const Longs4*>(at + 4);
        }
    const Longs4 c = a + b;
    return (c[0] + c[1]) + (c[2] + c[3]);
}

template <class AskFloats, class Ask, class AskEights>
constexpr ProductLoops kLoops = {{dot_fp32<AskFloats>, dot_fp32<Never>}, dot_bf16<AskFloats>, {dot_int8<Ask>, dot_int4<Ask, AskEights>},
                                 {dot_each<dot_int8<Ask>>, dot_each<dot_int4<Ask, AskEights>>}, {arrange_int8, arrange_int4}, read_words};

// Of processors with a first-level cache of 32 KB, and of 48 KB, where rows of fp32 come by themselves (Zen 5: 96 % of the bandwidth, 89
// when asked for).
static constexpr ProductLoops kProducts = kLoops<Soon, Second, Asks<3072, 2>>;
static constexpr ProductLoops near_products() {
    ProductLoops found = kLoops<First, First, First>;
    found.fp32[0] = dot_fp32<Never>;
    return found;
}
