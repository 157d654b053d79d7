// The loops of attention over a cache for one new token, once per instruction set; included by kernels.inl.
//
// A chunk of the cache meets all heads that share it, so that it is read from memory once: `Heads` queries by `Rows` positions
// at a time, eight sums under way. Floats are summed in 8 lanes (keys) or one position after the other (values), integers
// exactly: the same bits on every instruction set, in every tile. bfloat16 is read two elements a word, the even ones by a
// shift and the odd ones by a mask: queries lie in that order (`gather`), and `spread` takes it back from what comes out. What meets
// bfloat16, which has 8 bits, is rounded to 16, or weights to 8 where queries have no more: each product is exact in a float's 24, so
// that an instruction which multiplies and adds with one rounding gives what two instructions give.

// What a query takes in a row: whole pieces.
template <class Read>
static inline size_t padded_of(size_t dim) {
    return (dim + Read::kPiece - 1) / Read::kPiece * Read::kPiece;
}

template <class Read, class Take>
static inline __attribute__((always_inline)) void for_pieces(size_t dim, Take take) {
    size_t d = 0;
    for (; d + Read::kPiece <= dim; d += Read::kPiece) take(d, true);
    if (d < dim) take(d, false);
}

// `kPiece` elements are what keys are read by. Of bfloat16 that is 32, the odd ones (added first) and the even ones, or the 16 that a
// row ends with and as many zeros: what an instruction for products of pairs does, see kernels_bf16.cpp.
struct Pieces {
    Sixteen odd, even;
};

#ifdef DS_HAS_AVX512

struct ReadBFloats {
    using Element = uint16_t;
    using Piece = Pieces;
    static constexpr size_t kPiece = 32;
    static inline __attribute__((always_inline)) Piece piece(const uint16_t* at, bool is_whole) {
        const __m256i* from = reinterpret_cast<const __m256i*>(at);
        const Words both = (Words)(is_whole ? _mm512_loadu_si512(at) : _mm512_zextsi256_si512(_mm256_loadu_si256(from)));
        return {(Sixteen)(both & 0xffff0000u), (Sixteen)(both << 16)};
    }
    static inline __attribute__((always_inline)) void add(Sixteen& sum, const Piece& a, const float* b) {
        sum = (Sixteen)_mm512_fmadd_ps((__m512)a.odd, _mm512_loadu_ps(b), (__m512)sum);
        sum = (Sixteen)_mm512_fmadd_ps((__m512)a.even, _mm512_loadu_ps(b + 16), (__m512)sum);
    }
    static inline __attribute__((always_inline)) Sixteen read(const uint16_t* at) {
        const Sixteen wide = (Sixteen)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at))), 16);
        return wide;
    }
    static inline __attribute__((always_inline)) void add(Sixteen& sum, const Sixteen& a, float by) {
        sum = (Sixteen)_mm512_fmadd_ps((__m512)a, _mm512_set1_ps(by), (__m512)sum);
    }
};

constexpr size_t kTile = 16;   // sums of a tile
constexpr size_t kMixed = 16;  // vectors of sums of values that registers hold

// Sums of `Heads` queries with kTile / Heads rows.
template <class Read, size_t Heads>
static inline __attribute__((always_inline)) void score_tile(const typename Read::Element* keys, int64_t stride, size_t dim,
                                                             const float* queries, float factor, float* found) {
    constexpr size_t rows = kTile / Heads;
    const size_t of_query = padded_of<Read>(dim);
    Sixteen sums[kTile] = {};
    for_pieces<Read>(dim, [&](size_t d, bool is_whole) __attribute__((always_inline)) {
        for (size_t r = 0; r < rows; ++r) {
            const typename Read::Piece key = Read::piece(keys + static_cast<int64_t>(r) * stride + d, is_whole);
            for (size_t h = 0; h < Heads; ++h) {
                const size_t at = h * rows + r;
                Read::add(sums[at % 4 * 4 + at / 4], key, queries + h * of_query + d);
            }
        }
    });
    sum_tile(sums, factor, found);
}

#else

struct ReadBFloats {
    using Element = uint16_t;
    using Piece = Pieces;
    static constexpr size_t kPiece = 32;
    static inline __attribute__((always_inline)) Piece piece(const uint16_t* at, bool is_whole) {
        const Words8 low = *reinterpret_cast<const Words8*>(at), high = is_whole ? *reinterpret_cast<const Words8*>(at + 16) : Words8{};
        return {{(Floats8)(low & 0xffff0000u), (Floats8)(high & 0xffff0000u)}, {(Floats8)(low << 16), (Floats8)(high << 16)}};
    }
    static inline __attribute__((always_inline)) void add(Sixteen& sum, const Piece& a, const float* b) {
        add(sum, a.odd, b);
        add(sum, a.even, b + 16);
    }
    static inline __attribute__((always_inline)) Sixteen read(const uint16_t* at) {
        const Words8 both = *reinterpret_cast<const Words8*>(at);
        return {(Floats8)(both << 16), (Floats8)(both & 0xffff0000u)};
    }
#ifdef DS_HAS_AVX2
    static inline __attribute__((always_inline)) Floats8 fused(const Floats8& a, __m256 b, const Floats8& sum) {
        return (Floats8)_mm256_fmadd_ps((__m256)a, b, (__m256)sum);
    }
    static inline __attribute__((always_inline)) void add(Sixteen& sum, const Sixteen& a, const float* b) {
        sum = {fused(a.low, _mm256_loadu_ps(b), sum.low), fused(a.high, _mm256_loadu_ps(b + 8), sum.high)};
    }
    static inline __attribute__((always_inline)) void add(Sixteen& sum, const Sixteen& a, float by) {
        sum = {fused(a.low, _mm256_set1_ps(by), sum.low), fused(a.high, _mm256_set1_ps(by), sum.high)};
    }
#else
    static inline __attribute__((always_inline)) void add(Sixteen& sum, const Sixteen& a, const float* b) { sum += product(a, b); }
    static inline __attribute__((always_inline)) void add(Sixteen& sum, const Sixteen& a, float by) { sum += a * by; }
#endif
};

constexpr size_t kTile = 8;
constexpr size_t kMixed = 4;

// Half of the sums at a time: they lie in two registers each.
template <class Read, size_t Heads>
static inline __attribute__((always_inline)) void score_tile(const typename Read::Element* keys, int64_t stride, size_t dim,
                                                             const float* queries, float factor, float* found) {
    constexpr size_t rows = kTile / Heads, together = rows / 2;
    const size_t of_query = padded_of<Read>(dim);
    Floats8 sums[kTile];
    for (size_t first = 0; first < rows; first += together) {
        Sixteen under_way[kTile / 2] = {};
        for_pieces<Read>(dim, [&](size_t d, bool is_whole) __attribute__((always_inline)) {
            for (size_t r = 0; r < together; ++r) {
                const typename Read::Piece key = Read::piece(keys + static_cast<int64_t>(first + r) * stride + d, is_whole);
                for (size_t h = 0; h < Heads; ++h) Read::add(under_way[h * together + r], key, queries + h * of_query + d);
            }
        });
        for (size_t h = 0; h < Heads; ++h)
            for (size_t r = 0; r < together; ++r) fold(under_way[h * together + r], &sums[h * rows + first + r]);
    }
    sum_lanes(sums, found);
    for (size_t i = 0; i < kTile; ++i) found[i] *= factor;
}

#endif

static inline __attribute__((always_inline)) Sixteen load_sixteen(const float* at) {
    Sixteen found;
    std::memcpy(&found, at, sizeof found);
    return found;
}

// The last positions, fewer than a tile has, one by one: the same sums.
template <class Read>
static void score_one(const typename Read::Element* key, size_t dim, const float* query, float factor, float* score) {
    Sixteen sum = {};
    for_pieces<Read>(dim, [&](size_t d, bool is_whole) __attribute__((always_inline)) { Read::add(sum, Read::piece(key + d, is_whole), query + d); });
    Floats8 sums[8] = {};
    fold(sum, sums);
    float found[8];
    sum_lanes(sums, found);
    *score = found[0] * factor;
}

template <class Read, size_t Heads>
static inline void score_heads(const typename Read::Element* keys, int64_t stride, size_t n, size_t dim, const float* queries,
                               float factor, float* scores, int cache) {
    constexpr size_t rows = kTile / Heads;
    size_t r = 0;
    for (; r + rows <= n; r += rows) {
        const typename Read::Element* here = keys + static_cast<int64_t>(r) * stride;
        if (cache)
            for (size_t j = 0; j < rows; ++j) prefetch_row(here + static_cast<int64_t>(kTileRows + j) * stride, dim, cache);
        float found[kTile];
        score_tile<Read, Heads>(here, stride, dim, queries, factor, found);
        for (size_t h = 0; h < Heads; ++h) std::memcpy(scores + h * kChunk + r, found + h * rows, rows * sizeof *found);
    }
    for (; r < n; ++r)
        for (size_t h = 0; h < Heads; ++h)
            score_one<Read>(keys + static_cast<int64_t>(r) * stride, dim, queries + h * padded_of<Read>(dim), factor, scores + h * kChunk + r);
}

// scores [heads, kChunk] of n positions, times a factor; keys [n, dim] with `stride` elements from row to row, queries [heads, padded_of(dim)].
template <class Read>
static void score(const void* from, int64_t stride, size_t n, size_t dim, const float* queries, size_t heads, float factor,
                  float* scores, int cache) {
    const typename Read::Element* keys = static_cast<const typename Read::Element*>(from);
    const size_t of_query = padded_of<Read>(dim);
    for (size_t at = 0; at < n; at += kTileRows) {
        const size_t rows = n - at < kTileRows ? n - at : kTileRows;
        const typename Read::Element* here = keys + static_cast<int64_t>(at) * stride;
        const auto of = [&](size_t h) { return scores + h * kChunk + at; };
        size_t h = 0;
        for (; h + 4 <= heads; h += 4) score_heads<Read, 4>(here, stride, rows, dim, queries + h * of_query, factor, of(h), h == 0 ? cache : 0);
        for (; h + 2 <= heads; h += 2) score_heads<Read, 2>(here, stride, rows, dim, queries + h * of_query, factor, of(h), h == 0 ? cache : 0);
        for (; h < heads; ++h) score_heads<Read, 1>(here, stride, rows, dim, queries + h * of_query, factor, of(h), h == 0 ? cache : 0);
    }
}

// `Blocks` times 16 elements of values. With AVX-512 those of bfloat16 lie as `piece` has them, as long as there are 32.
template <class Read, size_t Blocks>
static inline __attribute__((always_inline)) void read_blocks(const typename Read::Element* at, Sixteen* to) {
    if constexpr (Read::kPiece == 32 && Blocks % 2 == 0 && kTile == 16) {
        for (size_t v = 0; v < Blocks; v += 2) {
            const typename Read::Piece piece = Read::piece(at + 16 * v, true);
            to[v] = piece.odd, to[v + 1] = piece.even;
        }
    } else {
        for (size_t v = 0; v < Blocks; ++v) to[v] = Read::read(at + 16 * v);
    }
}

// `Blocks` times 16 elements of out, from d on.
template <class Read, size_t Heads, size_t Blocks>
static inline __attribute__((always_inline)) void mix_blocks(const typename Read::Element* values, int64_t stride, size_t n,
                                                             size_t dim, size_t d, const float* weights, float* out,
                                                             int cache) {
    Sixteen sums[Heads][Blocks];
    for (size_t h = 0; h < Heads; ++h)
        for (size_t v = 0; v < Blocks; ++v) sums[h][v] = load_sixteen(out + h * dim + d + 16 * v);
    const bool asks = cache && d * sizeof(typename Read::Element) % 64 == 0;
    for (size_t r = 0; r < n; ++r) {
        const typename Read::Element* here = values + static_cast<int64_t>(r) * stride + d;
        Sixteen value[Blocks];
        if (asks) prefetch_row(here + static_cast<int64_t>(kTileRows) * stride, 16 * Blocks, cache);
        read_blocks<Read, Blocks>(here, value);
        for (size_t h = 0; h < Heads; ++h) {
            const float weight = weights[h * kChunk + r];
            for (size_t v = 0; v < Blocks; ++v) Read::add(sums[h][v], value[v], weight);
        }
    }
    for (size_t h = 0; h < Heads; ++h)
        for (size_t v = 0; v < Blocks; ++v) std::memcpy(out + h * dim + d + 16 * v, &sums[h][v], sizeof sums[h][v]);
}

template <class Read, size_t Heads>
static inline void mix_heads(const typename Read::Element* values, int64_t stride, size_t n, size_t dim, const float* weights,
                             float* out, int cache) {
    constexpr size_t blocks = kMixed / Heads < 4 ? kMixed / Heads : 4;
    size_t d = 0;
    for (; d + 16 * blocks <= dim; d += 16 * blocks)
        mix_blocks<Read, Heads, blocks>(values, stride, n, dim, d, weights, out, cache);
    if (blocks > 2 && d + 32 <= dim) mix_blocks<Read, Heads, 2>(values, stride, n, dim, d, weights, out, cache), d += 32;
    for (; d < dim; d += 16) mix_blocks<Read, Heads, 1>(values, stride, n, dim, d, weights, out, cache);
}

// out [heads, dim] += weights [heads, kChunk] times values [n, dim].
template <class Read>
static void mix(const void* from, int64_t stride, size_t n, size_t dim, const float* weights, size_t heads, float* out, int cache) {
    const typename Read::Element* values = static_cast<const typename Read::Element*>(from);
    for (size_t at = 0; at < n; at += kTileRows) {
        const size_t rows = n - at < kTileRows ? n - at : kTileRows;
        const typename Read::Element* here = values + static_cast<int64_t>(at) * stride;
        const auto mix_some = [&](auto mixes, size_t h) {
            mixes(here, stride, rows, dim, weights + h * kChunk + at, out + h * dim, h == 0 ? cache : 0);
        };
        size_t h = 0;
        for (; kMixed >= 16 && h + 8 <= heads; h += 8) mix_some(mix_heads<Read, kMixed >= 16 ? 8 : 4>, h);
        for (; h + 4 <= heads; h += 4) mix_some(mix_heads<Read, 4>, h);
        for (; h + 2 <= heads; h += 2) mix_some(mix_heads<Read, 2>, h);
        for (; h < heads; ++h) mix_some(mix_heads<Read, 1>, h);
    }
}

// x [dim] as pieces of bfloat16 meet it: the odd ones and the even ones of each 32, zeros up to whole ones.
static void gather(const float* x, size_t dim, float* to) {
    for (size_t i = 0; i < dim; i += 32)
        for (size_t j = 0; j < 16; ++j) {
            const bool is_there = i + 2 * j < dim;
            to[i + j] = is_there ? x[i + 2 * j + 1] : 0.0f;
            to[i + 16 + j] = is_there ? x[i + 2 * j] : 0.0f;
        }
}

// Sums of values of bfloat16 from the order in which read_blocks reads them.
static void spread(float* x, size_t dim) {
#ifdef DS_HAS_AVX512
    constexpr size_t half = 16, first = 1;  // a last half of a piece is in order
#else
    constexpr size_t half = 8, first = 0;
#endif
    for (size_t i = 0; i + 2 * half <= dim; i += 2 * half) {
        float whole[2 * half];
        std::memcpy(whole, x + i, sizeof whole);
        for (size_t j = 0; j < half; ++j) x[i + 2 * j + first] = whole[j], x[i + 2 * j + 1 - first] = whole[half + j];
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
                                     int cache) {
    constexpr size_t rows = 8 / Heads;
    size_t r = 0;
    for (; r + rows <= n; r += rows) {
        const int8_t* here = keys + static_cast<int64_t>(r) * stride;
        if (cache)
            for (size_t j = 0; j < rows; ++j) prefetch_row(here + static_cast<int64_t>(kTileRows + j) * stride, dim, cache);
        score_bytes_tile<Heads, rows>(here, stride, dim, queries, sums + r);
    }
    for (; r < n; ++r)
        for (size_t h = 0; h < Heads; ++h)
            score_bytes_one(keys + static_cast<int64_t>(r) * stride, dim, queries + h * dim, sums + h * kChunk + r);
}

// sums [heads, kChunk]: exact products of int8 keys with queries of 15 bits.
static void score_bytes(const int8_t* keys, int64_t stride, size_t n, size_t dim, const int16_t* queries, size_t heads,
                        int32_t* sums, int cache) {
    for (size_t at = 0; at < n; at += kTileRows) {
        const size_t rows = n - at < kTileRows ? n - at : kTileRows;
        const int8_t* here = keys + static_cast<int64_t>(at) * stride;
        const auto of = [&](size_t h) { return sums + h * kChunk + at; };
        size_t h = 0;
        for (; h + 4 <= heads; h += 4) score_bytes_heads<4>(here, stride, rows, dim, queries + h * dim, of(h), h == 0 ? cache : 0);
        for (; h + 2 <= heads; h += 2) score_bytes_heads<2>(here, stride, rows, dim, queries + h * dim, of(h), h == 0 ? cache : 0);
        for (; h < heads; ++h) score_bytes_heads<1>(here, stride, rows, dim, queries + h * dim, of(h), h == 0 ? cache : 0);
    }
}

// out [heads, dim] += weights [heads, kChunk] times int8 values, exact; a weight is 0 past the last position.
static void mix_bytes(const int8_t* values, int64_t stride, size_t n, size_t dim, const int16_t* weights, size_t heads,
                      int32_t* out, int cache) {
    for (size_t at = 0; at < n; at += kTileRows) {
        const size_t rows = n - at < kTileRows ? n - at : kTileRows;
        const int8_t* here = values + static_cast<int64_t>(at) * stride;
        for (size_t r = 0; r < rows; ++r) prefetch_row(here + static_cast<int64_t>(kTileRows + r) * stride, dim, cache);
        size_t h = 0;
        for (; h + 4 <= heads; h += 4)
            for (size_t d = 0; d < dim; d += 16)
                mix_bytes_of<4>(here, stride, rows, dim, d, weights + h * kChunk + at, out + h * dim);
        for (; h < heads; ++h)
            for (size_t d = 0; d < dim; d += 16)
                mix_bytes_of<1>(here, stride, rows, dim, d, weights + h * kChunk + at, out + h * dim);
    }
}

// x = e^x, for x <= 0: within 2 units of the last place, 0 below e^-87, NaN stays. After Cody and Waite: a power of two, and
// a polynomial of what is left, which Taylor's terms up to the seventh say to fp32. Each step for all registers: what waits for the
// step before it would fill the processor's queues (Zen 4: 28 cycles for 16 numbers by themselves).
template <size_t N>
static inline __attribute__((always_inline)) void exponentiate(Floats (&x)[N]) {
    Floats power[N], rest[N], sum[N];
    Ints is_small[N];
    for (size_t i = 0; i < N; ++i) {
        const Floats rounded = x[i] * 1.44269504f + 12582912.0f, whole = rounded - 12582912.0f;
        rest[i] = (x[i] - whole * 0.693359375f) - whole * -2.12194440e-4f;
        power[i] = (Floats)(((Words)rounded + 127u) << 23);
        is_small[i] = x[i] < -87.0f;
    }
    for (size_t i = 0; i < N; ++i) sum[i] = rest[i] * (1.0f / 5040) + 1.0f / 720;
    constexpr float terms[] = {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
    for (const float term : terms)
        for (size_t i = 0; i < N; ++i) sum[i] = sum[i] * rest[i] + term;
    for (size_t i = 0; i < N; ++i) x[i] = (Floats)((Ints)(sum[i] * power[i]) & ~is_small[i]);
}

// take(i, e^(x[i] - top)) for each register of x [n], n a multiple of 16, in their order.
template <class Take>
static inline __attribute__((always_inline)) void for_exponentials(const float* x, size_t n, float top, Take take) {
    constexpr size_t together = 4 * kWidth;
    size_t i = 0;
    const auto some = [&](auto& found) __attribute__((always_inline)) {
        for (Floats& one : found) one = *reinterpret_cast<const Floats*>(x + i + (&one - found) * kWidth) - top;
        exponentiate(found);
        for (const Floats& one : found) take(i, one), i += kWidth;
    };
    for (Floats found[4]; i + together <= n;) some(found);
    for (Floats found[1]; i < n;) some(found);
}

static void exponentials(float* x, size_t n, float top) {
    for_exponentials(x, n, top, [&](size_t i, const Floats& found) __attribute__((always_inline)) { *reinterpret_cast<Floats*>(x + i) = found; });
}

// Rounded to 24 bits less those that are dropped, to even. What is not finite stays so.
template <uint32_t Dropped>
static inline __attribute__((always_inline)) void shorten(Floats& x) {
    constexpr uint32_t rest = (1u << Dropped) - 1;
    const Words bits = (Words)x, nearest = (bits + rest / 2 + (bits >> Dropped & 1u)) & ~rest;
    const Ints is_finite = (Ints)(bits & 0x7f800000u) < 0x7f800000;
    x = (Floats)((nearest & (Words)is_finite) | (bits & ~(Words)is_finite));
}

static void shorten(float* x, size_t n) {
    for (size_t i = 0; i < n; i += kWidth) shorten<8>(*reinterpret_cast<Floats*>(x + i));
}

// Sums of what is taken in, a register at a time, in 16 lanes.
struct Total {
    Floats lanes[16 / kWidth] = {};

    inline __attribute__((always_inline)) void take(size_t i, const Floats& x) { lanes[i / kWidth % (16 / kWidth)] += x; }
    float whole() const {
        Floats8 sums[2];
        static_assert(sizeof sums == sizeof lanes, "16 lanes");
        std::memcpy(sums, lanes, sizeof sums);
        const Floats8 all = sums[0] + sums[1];
        return ((all[0] + all[4]) + (all[2] + all[6])) + ((all[1] + all[5]) + (all[3] + all[7]));
    }
};

// x = e^(x - top), rounded where bits are dropped; their sum. n is a multiple of 16.
template <uint32_t Dropped>
static float weigh(float* x, size_t n, float top) {
    Total total;
    for_exponentials(x, n, top, [&](size_t i, Floats weight) __attribute__((always_inline)) {
        if (Dropped) shorten<Dropped>(weight);
        *reinterpret_cast<Floats*>(x + i) = weight;
        total.take(i, weight);
    });
    return total.whole();
}

// The largest of x [n], n a multiple of 16; NaN where one is. Four at a time: each waits for the one before it.
static float largest(const float* x, size_t n) {
#ifdef DS_HAS_AVX512
    __m512 top = _mm512_loadu_ps(x), other = top;
    __mmask16 is_nan = 0;
    for (size_t i = 0; i < n; i += 16) {
        const __m512 here = _mm512_loadu_ps(x + i);
        is_nan |= _mm512_cmp_ps_mask(here, here, _CMP_UNORD_Q);
        (i / 16 % 2 ? other : top) = _mm512_max_ps(i / 16 % 2 ? other : top, here);
    }
    return is_nan ? NAN : _mm512_reduce_max_ps(_mm512_max_ps(top, other));
#else
    Floats most[4];
    for (Floats& one : most) one = *reinterpret_cast<const Floats*>(x);
    const auto take = [&](Floats& one, size_t i) __attribute__((always_inline)) {
        const Floats here = *reinterpret_cast<const Floats*>(x + i);
        const Ints takes = (here > one) | (here != here);
        one = (Floats)(((Ints)here & takes) | ((Ints)one & ~takes));
    };
    size_t i = 0;
    for (; i + 4 * kWidth <= n; i += 4 * kWidth)
        for (size_t j = 0; j < 4; ++j) take(most[j], i + j * kWidth);
    for (; i < n; i += kWidth) take(most[0], i);
    float each[4 * kWidth];
    std::memcpy(each, most, sizeof most);
    float found = each[0];
    for (const float one : each) found = one > found || one != one ? one : found;
    return found;
#endif
}

// to [n] = sums times factor and by, n a multiple of 16.
static void scale_sums(const int32_t* sums, const float* by, float factor, size_t n, float* to) {
    for (size_t i = 0; i < n; i += kWidth)
        *reinterpret_cast<Floats*>(to + i) = __builtin_convertvector(*reinterpret_cast<const Ints*>(sums + i), Floats) *
                                              (*reinterpret_cast<const Floats*>(by + i) * factor);
}

// to [n] = sums times factor, n a multiple of 16.
static void to_floats(const int32_t* sums, float factor, size_t n, float* to) {
    for (size_t i = 0; i < n; i += kWidth)
        *reinterpret_cast<Floats*>(to + i) = __builtin_convertvector(*reinterpret_cast<const Ints*>(sums + i), Floats) * factor;
}

// to [n] += x times factor, n a multiple of 16.
static void add_scaled(const float* x, float factor, size_t n, float* to) {
    for (size_t i = 0; i < n; i += kWidth) *reinterpret_cast<Floats*>(to + i) += *reinterpret_cast<const Floats*>(x + i) * factor;
}

// The largest magnitude of what is taken in: magnitudes are ordered as their bits are.
struct Largest {
    Ints most[4] = {};

    inline __attribute__((always_inline)) void take(size_t i, const Floats& x) {
        const Ints magnitude = (Ints)x & 0x7fffffff;
        Ints& one = most[i / kWidth % 4];
        one = magnitude > one ? magnitude : one;
    }
    float whole() const {
        int32_t each[4 * kWidth], bits = 0;
        std::memcpy(each, most, sizeof most);
        for (const int32_t one : each) bits = one > bits ? one : bits;
        return float_of(static_cast<uint32_t>(bits));
    }
};

// x [n] as int16 with one scale, the largest magnitude, `top`, at 32639 (both bytes of it fit, whatever the sign); NaN where x is not
// finite. n is a multiple of 16.
static float round_words(const float* x, size_t n, float top, int16_t* to) {
    const bool is_finite = top <= 3.0e38f;
    const float scale = is_finite ? top / 32639.0f : NAN, inverse = scale > 0 ? 1.0f / scale : 0.0f;
    for (size_t i = 0; i < n; i += kWidth) {
        const Floats value = is_finite ? *reinterpret_cast<const Floats*>(x + i) * inverse : Floats{};
        const Ints sign = (Ints)value & static_cast<int32_t>(0x80000000u);
        Ints q = __builtin_convertvector(value + (Floats)(sign | 0x3f000000), Ints);
        q = q > 32639 ? Ints{} + 32639 : q;
        q = q < -32639 ? Ints{} - 32639 : q;
        *reinterpret_cast<Shorts*>(to + i) = __builtin_convertvector(q, Shorts);
    }
    return scale;
}

static float to_words(const float* x, size_t n, int16_t* to) {
    Largest largest;
    for (size_t i = 0; i < n; i += kWidth) largest.take(i, *reinterpret_cast<const Floats*>(x + i));
    return round_words(x, n, largest.whole(), to);
}

// to = e^(x - top) times by, as to_words makes it; the sum of e^(x - top). x is changed.
static float weigh_words(float* x, const float* by, size_t n, float top, int16_t* to, float* sum) {
    Total total;
    Largest largest;
    for_exponentials(x, n, top, [&](size_t i, const Floats& weight) __attribute__((always_inline)) {
        const Floats scaled = weight * *reinterpret_cast<const Floats*>(by + i);
        *reinterpret_cast<Floats*>(x + i) = scaled;
        total.take(i, weight);
        largest.take(i, scaled);
    });
    *sum = total.whole();
    return round_words(x, n, largest.whole(), to);
}
