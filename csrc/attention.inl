// The loops of attention over a cache for one new token, once per instruction set; included by kernels.inl.
//
// A chunk of the cache meets all heads that share it, so that it is read from memory once: `Heads` queries by `Rows` positions
// at a time, eight sums under way. Floats are summed in 8 lanes (keys) or one position after the other (values), integers
// exactly: the same bits on every instruction set, in every tile. bfloat16 is read two elements a word, the even ones by a
// shift and the odd ones by a mask: queries lie in that order, and `spread` takes it back from what comes out.

constexpr size_t kTileRows = 32;  // positions that are in the first-level cache for all heads

// 16 elements of a row as two vectors.
struct ReadFloats {
    using Element = float;
    static inline __attribute__((always_inline)) void read(const float* at, Floats8* to) {
        to[0] = *reinterpret_cast<const Floats8*>(at);
        to[1] = *reinterpret_cast<const Floats8*>(at + 8);
    }
};

struct ReadBFloats {
    using Element = uint16_t;
    static inline __attribute__((always_inline)) void read(const uint16_t* at, Floats8* to) {
        const Words8 both = *reinterpret_cast<const Words8*>(at);
        to[0] = (Floats8)(both << 16);
        to[1] = (Floats8)(both & 0xffff0000u);
    }
};

template <class Read, size_t Heads, size_t Rows>
static inline __attribute__((always_inline)) void score_tile(const typename Read::Element* keys, int64_t stride, size_t dim,
                                                             const float* queries, float* scores) {
    static_assert(Heads * Rows == 8, "eight sums are added up together");
    Floats8 sums[8] = {};
    for (size_t d = 0; d < dim; d += 16) {
        for (size_t r = 0; r < Rows; ++r) {
            Floats8 key[2];
            Read::read(keys + static_cast<int64_t>(r) * stride + d, key);
            for (size_t h = 0; h < Heads; ++h) {
                const float* query = queries + h * dim + d;
                sums[h * Rows + r] += key[0] * *reinterpret_cast<const Floats8*>(query);
                sums[h * Rows + r] += key[1] * *reinterpret_cast<const Floats8*>(query + 8);
            }
        }
    }
    float found[8];
    sum_lanes(sums, found);
    for (size_t h = 0; h < Heads; ++h)
        for (size_t r = 0; r < Rows; ++r) scores[h * kChunk + r] = found[h * Rows + r];
}

// The last positions, fewer than a tile has, one by one: the same sums.
template <class Read>
static void score_one(const typename Read::Element* key, size_t dim, const float* query, float* score) {
    Floats8 sums[8] = {};
    for (size_t d = 0; d < dim; d += 16) {
        Floats8 read[2];
        Read::read(key + d, read);
        sums[0] += read[0] * *reinterpret_cast<const Floats8*>(query + d);
        sums[0] += read[1] * *reinterpret_cast<const Floats8*>(query + d + 8);
    }
    float found[8];
    sum_lanes(sums, found);
    *score = found[0];
}

// Asks for a row of the next tile, while this one is worked on: a burst of requests would hold up what it is for.
template <class Element>
static inline __attribute__((always_inline)) void prefetch_row(const Element* row, size_t dim) {
    const char* at = reinterpret_cast<const char*>(row);
    for (size_t b = 0; b < dim * sizeof(Element); b += 64) __builtin_prefetch(at + b);
}

template <class Read, size_t Heads>
static inline void score_heads(const typename Read::Element* keys, int64_t stride, size_t n, size_t dim, const float* queries,
                               float* scores, bool is_first) {
    constexpr size_t rows = 8 / Heads;
    size_t r = 0;
    for (; r + rows <= n; r += rows) {
        const typename Read::Element* here = keys + static_cast<int64_t>(r) * stride;
        if (is_first)
            for (size_t j = 0; j < rows; ++j) prefetch_row(here + static_cast<int64_t>(kTileRows + j) * stride, dim);
        score_tile<Read, Heads, rows>(here, stride, dim, queries, scores + r);
    }
    for (; r < n; ++r)
        for (size_t h = 0; h < Heads; ++h)
            score_one<Read>(keys + static_cast<int64_t>(r) * stride, dim, queries + h * dim, scores + h * kChunk + r);
}

// scores [heads, kChunk] of n positions, keys [n, dim] with `stride` elements from row to row, queries [heads, dim].
template <class Read>
static void score(const void* from, int64_t stride, size_t n, size_t dim, const float* queries, size_t heads, float* scores) {
    const typename Read::Element* keys = static_cast<const typename Read::Element*>(from);
    for (size_t at = 0; at < n; at += kTileRows) {
        const size_t rows = n - at < kTileRows ? n - at : kTileRows;
        const typename Read::Element* here = keys + static_cast<int64_t>(at) * stride;
        const auto of = [&](size_t h) { return scores + h * kChunk + at; };
        size_t h = 0;
        for (; h + 4 <= heads; h += 4) score_heads<Read, 4>(here, stride, rows, dim, queries + h * dim, of(h), h == 0);
        for (; h + 2 <= heads; h += 2) score_heads<Read, 2>(here, stride, rows, dim, queries + h * dim, of(h), h == 0);
        for (; h < heads; ++h) score_heads<Read, 1>(here, stride, rows, dim, queries + h * dim, of(h), h == 0);
    }
}

template <class Read, size_t Heads>
static inline __attribute__((always_inline)) void mix_heads(const typename Read::Element* values, int64_t stride, size_t n,
                                                            size_t dim, size_t d, const float* weights, float* out,
                                                            bool is_first) {
    constexpr size_t vectors = 8 / Heads;
    Floats8 sums[8];
    for (size_t h = 0; h < Heads; ++h)
        for (size_t v = 0; v < vectors; ++v) sums[h * vectors + v] = *reinterpret_cast<Floats8*>(out + h * dim + d + 8 * v);
    const bool asks = is_first && d * sizeof(typename Read::Element) % 64 == 0;
    for (size_t r = 0; r < n; ++r) {
        Floats8 value[vectors];
        if (asks) prefetch_row(values + static_cast<int64_t>(r + kTileRows) * stride + d, 8 * vectors);
        for (size_t v = 0; v < vectors; v += 2) Read::read(values + static_cast<int64_t>(r) * stride + d + 8 * v, value + v);
        for (size_t h = 0; h < Heads; ++h) {
            const float weight = weights[h * kChunk + r];
            for (size_t v = 0; v < vectors; ++v) sums[h * vectors + v] += value[v] * weight;
        }
    }
    for (size_t h = 0; h < Heads; ++h)
        for (size_t v = 0; v < vectors; ++v) *reinterpret_cast<Floats8*>(out + h * dim + d + 8 * v) = sums[h * vectors + v];
}

// out [heads, dim] += weights [heads, kChunk] times values [n, dim].
template <class Read>
static void mix(const void* from, int64_t stride, size_t n, size_t dim, const float* weights, size_t heads, float* out) {
    const typename Read::Element* values = static_cast<const typename Read::Element*>(from);
    for (size_t at = 0; at < n; at += kTileRows) {
        const size_t rows = n - at < kTileRows ? n - at : kTileRows;
        const typename Read::Element* here = values + static_cast<int64_t>(at) * stride;
        size_t h = 0;
        for (; h + 4 <= heads; h += 4)
            for (size_t d = 0; d < dim; d += 16)
                mix_heads<Read, 4>(here, stride, rows, dim, d, weights + h * kChunk + at, out + h * dim, h == 0);
        for (; h < heads; ++h) {
            size_t d = 0;
            for (; d + 64 <= dim; d += 64)
                mix_heads<Read, 1>(here, stride, rows, dim, d, weights + h * kChunk + at, out + h * dim, h == 0);
            for (; d < dim; d += 16) {  // the same sums, a quarter of them under way
                Floats8 sums[2] = {*reinterpret_cast<Floats8*>(out + h * dim + d), *reinterpret_cast<Floats8*>(out + h * dim + d + 8)};
                for (size_t r = 0; r < rows; ++r) {
                    Floats8 value[2];
                    Read::read(here + static_cast<int64_t>(r) * stride + d, value);
                    const float weight = weights[h * kChunk + at + r];
                    sums[0] += value[0] * weight;
                    sums[1] += value[1] * weight;
                }
                *reinterpret_cast<Floats8*>(out + h * dim + d) = sums[0];
                *reinterpret_cast<Floats8*>(out + h * dim + d + 8) = sums[1];
            }
        }
    }
}

// Elements in the order in which bfloat16 is read, and back: 16 at a time, the even ones first.
static void gather(float* x, size_t n) {
    for (size_t i = 0; i < n; i += 16) {
        float whole[16];
        std::memcpy(whole, x + i, sizeof whole);
        for (size_t j = 0; j < 8; ++j) x[i + j] = whole[2 * j], x[i + 8 + j] = whole[2 * j + 1];
    }
}

static void spread(float* x, size_t n) {
    for (size_t i = 0; i < n; i += 16) {
        float whole[16];
        std::memcpy(whole, x + i, sizeof whole);
        for (size_t j = 0; j < 8; ++j) x[i + 2 * j] = whole[j], x[i + 2 * j + 1] = whole[8 + j];
    }
}

static void score_bytes_one(const int8_t* key, size_t dim, const int16_t* query, int32_t* to) {
    int32_t sum = 0;
    for (size_t d = 0; d < dim; ++d) sum += key[d] * query[d];
    *to = sum;
}

#ifdef DS_HAS_AVX2

template <size_t Heads, size_t Rows>
static inline __attribute__((always_inline)) void score_bytes_tile(const int8_t* keys, int64_t stride, size_t dim,
                                                                   const int16_t* queries, int32_t* sums) {
    static_assert(Heads * Rows == 8, "eight sums are added up together");
    __m256i lanes[8];
    for (size_t i = 0; i < 8; ++i) lanes[i] = _mm256_setzero_si256();
    for (size_t d = 0; d < dim; d += 16) {
        __m256i query[Heads];
        for (size_t h = 0; h < Heads; ++h) query[h] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(queries + h * dim + d));
        for (size_t r = 0; r < Rows; ++r) {
            const int8_t* at = keys + static_cast<int64_t>(r) * stride + d;
            const __m256i wide = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
            for (size_t h = 0; h < Heads; ++h)
                lanes[h * Rows + r] = _mm256_add_epi32(lanes[h * Rows + r], _mm256_madd_epi16(wide, query[h]));
        }
    }
    const __m256i first = _mm256_hadd_epi32(_mm256_hadd_epi32(lanes[0], lanes[1]), _mm256_hadd_epi32(lanes[2], lanes[3]));
    const __m256i second = _mm256_hadd_epi32(_mm256_hadd_epi32(lanes[4], lanes[5]), _mm256_hadd_epi32(lanes[6], lanes[7]));
    alignas(32) int32_t found[8];
    _mm256_store_si256(reinterpret_cast<__m256i*>(found), _mm256_add_epi32(_mm256_permute2x128_si256(first, second, 0x20),
                                                                           _mm256_permute2x128_si256(first, second, 0x31)));
    for (size_t h = 0; h < Heads; ++h) std::memcpy(sums + h * kChunk, found + h * Rows, Rows * sizeof *sums);
}

static inline __m256i pairs_of(const int16_t* weights) {
    int32_t both;
    std::memcpy(&both, weights, sizeof both);
    return _mm256_set1_epi32(both);
}

// out [dim] of `Heads` += two positions' values at a time: neighbours in a pair of 16 bits are multiplied and added by one
// instruction. Each 16 elements of `out` lie as _mm256_unpacklo and _mm256_unpackhi leave them: not at all changed, since what
// is unpacked is widened after.
template <size_t Heads>
static inline __attribute__((always_inline)) void mix_bytes_of(const int8_t* values, int64_t stride, size_t n, size_t dim, size_t d,
                                                               const int16_t* weights, int32_t* out) {
    __m256i sums[Heads][2];
    for (size_t h = 0; h < Heads; ++h)
        for (size_t v = 0; v < 2; ++v)
            sums[h][v] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(out + h * dim + d + 8 * v));
    for (size_t r = 0; r < n; r += 2) {
        const int8_t* at = values + static_cast<int64_t>(r) * stride + d;
        const __m128i first = _mm_loadu_si128(reinterpret_cast<const __m128i*>(at));
        const __m128i second = r + 1 < n ? _mm_loadu_si128(reinterpret_cast<const __m128i*>(at + stride)) : _mm_setzero_si128();
        const __m256i low = _mm256_cvtepi8_epi16(_mm_unpacklo_epi8(first, second));
        const __m256i high = _mm256_cvtepi8_epi16(_mm_unpackhi_epi8(first, second));
        for (size_t h = 0; h < Heads; ++h) {
            const __m256i pair = pairs_of(weights + h * kChunk + r);
            sums[h][0] = _mm256_add_epi32(sums[h][0], _mm256_madd_epi16(low, pair));
            sums[h][1] = _mm256_add_epi32(sums[h][1], _mm256_madd_epi16(high, pair));
        }
    }
    for (size_t h = 0; h < Heads; ++h)
        for (size_t v = 0; v < 2; ++v)
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + h * dim + d + 8 * v), sums[h][v]);
}

#else

template <size_t Heads, size_t Rows>
static void score_bytes_tile(const int8_t* keys, int64_t stride, size_t dim, const int16_t* queries, int32_t* sums) {
    for (size_t h = 0; h < Heads; ++h)
        for (size_t r = 0; r < Rows; ++r) score_bytes_one(keys + static_cast<int64_t>(r) * stride, dim, queries + h * dim, sums + h * kChunk + r);
}

template <size_t Heads>
static void mix_bytes_of(const int8_t* values, int64_t stride, size_t n, size_t dim, size_t d, const int16_t* weights,
                         int32_t* out) {
    for (size_t h = 0; h < Heads; ++h)
        for (size_t r = 0; r < n; ++r)
            for (size_t i = 0; i < 16; ++i)
                out[h * dim + d + i] += values[static_cast<int64_t>(r) * stride + d + i] * weights[h * kChunk + r];
}

#endif

template <size_t Heads>
static inline void score_bytes_heads(const int8_t* keys, int64_t stride, size_t n, size_t dim, const int16_t* queries, int32_t* sums,
                                     bool is_first) {
    constexpr size_t rows = 8 / Heads;
    size_t r = 0;
    for (; r + rows <= n; r += rows) {
        const int8_t* here = keys + static_cast<int64_t>(r) * stride;
        if (is_first)
            for (size_t j = 0; j < rows; ++j) prefetch_row(here + static_cast<int64_t>(kTileRows + j) * stride, dim);
        score_bytes_tile<Heads, rows>(here, stride, dim, queries, sums + r);
    }
    for (; r < n; ++r)
        for (size_t h = 0; h < Heads; ++h)
            score_bytes_one(keys + static_cast<int64_t>(r) * stride, dim, queries + h * dim, sums + h * kChunk + r);
}

// sums [heads, kChunk]: exact products of int8 keys with queries of 15 bits.
static void score_bytes(const int8_t* keys, int64_t stride, size_t n, size_t dim, const int16_t* queries, size_t heads,
                        int32_t* sums) {
    for (size_t at = 0; at < n; at += kTileRows) {
        const size_t rows = n - at < kTileRows ? n - at : kTileRows;
        const int8_t* here = keys + static_cast<int64_t>(at) * stride;
        const auto of = [&](size_t h) { return sums + h * kChunk + at; };
        size_t h = 0;
        for (; h + 4 <= heads; h += 4) score_bytes_heads<4>(here, stride, rows, dim, queries + h * dim, of(h), h == 0);
        for (; h + 2 <= heads; h += 2) score_bytes_heads<2>(here, stride, rows, dim, queries + h * dim, of(h), h == 0);
        for (; h < heads; ++h) score_bytes_heads<1>(here, stride, rows, dim, queries + h * dim, of(h), h == 0);
    }
}

// out [heads, dim] += weights [heads, kChunk] times int8 values, exact; a weight is 0 past the last position.
static void mix_bytes(const int8_t* values, int64_t stride, size_t n, size_t dim, const int16_t* weights, size_t heads,
                      int32_t* out) {
    for (size_t at = 0; at < n; at += kTileRows) {
        const size_t rows = n - at < kTileRows ? n - at : kTileRows;
        const int8_t* here = values + static_cast<int64_t>(at) * stride;
        for (size_t r = 0; r < rows; ++r) prefetch_row(here + static_cast<int64_t>(kTileRows + r) * stride, dim);
        size_t h = 0;
        for (; h + 4 <= heads; h += 4)
            for (size_t d = 0; d < dim; d += 16)
                mix_bytes_of<4>(here, stride, rows, dim, d, weights + h * kChunk + at, out + h * dim);
        for (; h < heads; ++h)
            for (size_t d = 0; d < dim; d += 16)
                mix_bytes_of<1>(here, stride, rows, dim, d, weights + h * kChunk + at, out + h * dim);
    }
}

// x = e^(x - top), for x <= top: within 2 units of the last place, 0 below e^-87, NaN stays. n is a multiple of 8. After Cody
// and Waite: a power of two, and a polynomial of what is left, which Taylor's terms up to the seventh say to fp32.
static void exponentials(float* x, size_t n, float top) {
    for (size_t i = 0; i < n; i += 8) {
        const Floats8 distance = *reinterpret_cast<Floats8*>(x + i) - top;
        const Floats8 rounded = distance * 1.44269504f + 12582912.0f;
        const Floats8 whole = rounded - 12582912.0f;
        const Floats8 rest = (distance - whole * 0.693359375f) - whole * -2.12194440e-4f;
        Floats8 sum = rest * (1.0f / 5040) + 1.0f / 720;
        sum = sum * rest + 1.0f / 120;
        sum = sum * rest + 1.0f / 24;
        sum = sum * rest + 1.0f / 6;
        sum = sum * rest + 0.5f;
        sum = sum * rest + 1.0f;
        sum = sum * rest + 1.0f;
        const Words8 power = ((Words8)rounded + 127u) << 23;
        const Floats8 found = sum * (Floats8)power;
        const Ints8 is_small = distance < -87.0f;
        *reinterpret_cast<Floats8*>(x + i) = (Floats8)((Ints8)found & ~is_small);
    }
}

// The largest of x [n], n a multiple of 8; NaN where one is.
static float largest(const float* x, size_t n) {
    Floats8 most = *reinterpret_cast<const Floats8*>(x);
    for (size_t i = 8; i < n; i += 8) {
        const Floats8 here = *reinterpret_cast<const Floats8*>(x + i);
        const Ints8 takes = (here > most) | (here != here);
        most = (Floats8)(((Ints8)here & takes) | ((Ints8)most & ~takes));
    }
    float found = most[0];
    for (int j = 1; j < 8; ++j) found = most[j] > found || most[j] != most[j] ? most[j] : found;
    return found;
}

// The sum of x [n] in 8 lanes, n a multiple of 8.
static float total(const float* x, size_t n) {
    Floats8 sums = {};
    for (size_t i = 0; i < n; i += 8) sums += *reinterpret_cast<const Floats8*>(x + i);
    return ((sums[0] + sums[4]) + (sums[2] + sums[6])) + ((sums[1] + sums[5]) + (sums[3] + sums[7]));
}

// to [n] = sums times factor and by, n a multiple of 8.
static void scale_sums(const int32_t* sums, const float* by, float factor, size_t n, float* to) {
    for (size_t i = 0; i < n; i += 8)
        *reinterpret_cast<Floats8*>(to + i) = __builtin_convertvector(*reinterpret_cast<const Ints8*>(sums + i), Floats8) *
                                              (*reinterpret_cast<const Floats8*>(by + i) * factor);
}

static void times(float* x, const float* by, size_t n) {
    for (size_t i = 0; i < n; i += 8) *reinterpret_cast<Floats8*>(x + i) *= *reinterpret_cast<const Floats8*>(by + i);
}

// x [n] as int16 with one scale, the largest magnitude at 32767; NaN where x is not finite. n is a multiple of 8.
static float to_words(const float* x, size_t n, int16_t* to) {
    typedef int16_t Shorts8 __attribute__((vector_size(16), aligned(2), may_alias));
    Ints8 most = {};  // magnitudes are ordered as their bits are
    for (size_t i = 0; i < n; i += 8) {
        const Ints8 magnitude = *reinterpret_cast<const Ints8*>(x + i) & 0x7fffffff;
        const Ints8 takes = magnitude > most;
        most = (magnitude & takes) | (most & ~takes);
    }
    int32_t bits = most[0];
    for (int j = 1; j < 8; ++j) bits = most[j] > bits ? most[j] : bits;
    const float top = float_of(static_cast<uint32_t>(bits));
    const bool is_finite = top <= 3.0e38f;
    const float scale = is_finite ? top / 32767.0f : NAN, inverse = scale > 0 ? 1.0f / scale : 0.0f;
    for (size_t i = 0; i < n; i += 8) {
        const Floats8 value = is_finite ? *reinterpret_cast<const Floats8*>(x + i) * inverse : Floats8{};
        const Ints8 sign = (Ints8)value & static_cast<int32_t>(0x80000000u);
        Ints8 q = __builtin_convertvector(value + (Floats8)(sign | 0x3f000000), Ints8);
        const Ints8 over = q > 32767, under = q < -32767;
        q = (q & ~(over | under)) | (over & 32767) | (under & -32767);
        *reinterpret_cast<Shorts8*>(to + i) = __builtin_convertvector(q, Shorts8);
    }
    return scale;
}
