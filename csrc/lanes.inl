// Vectors of 8 and of 16 lanes and their sums, once per instruction set; what the loops of products and of attention are written in.

typedef float Floats8 __attribute__((vector_size(32), aligned(4), may_alias));
typedef uint32_t Words8 __attribute__((vector_size(32), aligned(4), may_alias));
typedef int32_t Ints8 __attribute__((vector_size(32), aligned(4), may_alias));

// As many lanes as registers have, for what is done to each element by itself: n is a multiple of 16 there.
#ifdef DS_HAS_AVX512
constexpr size_t kWidth = 16;
typedef float Floats __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint32_t Words __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t Ints __attribute__((vector_size(64), aligned(4), may_alias));
typedef int16_t Shorts __attribute__((vector_size(32), aligned(2), may_alias));
#else
constexpr size_t kWidth = 8;
using Floats = Floats8;
using Words = Words8;
using Ints = Ints8;
typedef int16_t Shorts __attribute__((vector_size(16), aligned(2), may_alias));
#endif

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

// 16 elements of a row, and sums of their products in as many lanes, which `fold` makes 8.
#ifdef DS_HAS_AVX512
using Sixteen = Floats;

struct ReadFloats {
    using Element = float;
    using Piece = Sixteen;
    static constexpr size_t kPiece = 16;
    static inline __attribute__((always_inline)) Sixteen piece(const float* at, bool) { return read(at); }
    static inline __attribute__((always_inline)) Sixteen read(const float* at) { return *reinterpret_cast<const Floats*>(at); }
    static inline __attribute__((always_inline)) void add(Sixteen& sum, const Sixteen& a, const float* b) {
        sum += a * *reinterpret_cast<const Floats*>(b);
    }
    static inline __attribute__((always_inline)) void add(Sixteen& sum, const Sixteen& a, float by) { sum += a * by; }
};

static inline __attribute__((always_inline)) Sixteen product(const Sixteen& a, const float* b) {
    return a * *reinterpret_cast<const Floats*>(b);
}

static inline __attribute__((always_inline)) void fold(const Sixteen& sums, Floats8* to) {
    *to = (Floats8)_mm512_castps512_ps256((__m512)sums) + (Floats8)_mm512_extractf32x8_ps((__m512)sums, 1);
}

// found[i] = factor times the lanes of v[i % 4 * 4 + i / 4], added as fold and sum_lanes do.
static inline __attribute__((always_inline)) void sum_tile(const Sixteen* v, float factor, float* found) {
    __m512 half[8], quarter[4], eighth[2];
    for (int i = 0; i < 8; ++i) {
        const __m512 a = (__m512)v[2 * i], b = (__m512)v[2 * i + 1];
        half[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
    }
    for (int i = 0; i < 4; ++i)
        quarter[i] = _mm512_add_ps(_mm512_shuffle_f32x4(half[2 * i], half[2 * i + 1], 0x88),
                                   _mm512_shuffle_f32x4(half[2 * i], half[2 * i + 1], 0xdd));
    for (int i = 0; i < 2; ++i)
        eighth[i] = _mm512_add_ps(_mm512_shuffle_ps(quarter[2 * i], quarter[2 * i + 1], 0x44),
                                  _mm512_shuffle_ps(quarter[2 * i], quarter[2 * i + 1], 0xee));
    const __m512 all = _mm512_add_ps(_mm512_shuffle_ps(eighth[0], eighth[1], 0x88), _mm512_shuffle_ps(eighth[0], eighth[1], 0xdd));
    _mm512_storeu_ps(found, _mm512_mul_ps(all, _mm512_set1_ps(factor)));
}
#else
struct Sixteen {
    Floats8 low, high;

    inline __attribute__((always_inline)) Sixteen& operator+=(const Sixteen& other) {
        low += other.low;
        high += other.high;
        return *this;
    }
    inline __attribute__((always_inline)) Sixteen operator*(float by) const { return {low * by, high * by}; }
};

struct ReadFloats {
    using Element = float;
    using Piece = Sixteen;
    static constexpr size_t kPiece = 16;
    static inline __attribute__((always_inline)) Sixteen piece(const float* at, bool) { return read(at); }
    static inline __attribute__((always_inline)) Sixteen read(const float* at) {
        return {*reinterpret_cast<const Floats8*>(at), *reinterpret_cast<const Floats8*>(at + 8)};
    }
    static inline __attribute__((always_inline)) void add(Sixteen& sum, const Sixteen& a, const float* b) {
        sum += {a.low * *reinterpret_cast<const Floats8*>(b), a.high * *reinterpret_cast<const Floats8*>(b + 8)};
    }
    static inline __attribute__((always_inline)) void add(Sixteen& sum, const Sixteen& a, float by) { sum += a * by; }
};

static inline __attribute__((always_inline)) Sixteen product(const Sixteen& a, const float* b) {
    return {a.low * *reinterpret_cast<const Floats8*>(b), a.high * *reinterpret_cast<const Floats8*>(b + 8)};
}

static inline __attribute__((always_inline)) void fold(const Sixteen& sums, Floats8* to) { *to = sums.low + sums.high; }
#endif

constexpr size_t kTileRows = 32;  // positions of a cache that are in the first-level cache for all heads

// Asks for the line at an address, for the first- or second-level cache: what waits in the first is pushed out by rows that lie a multiple
// of 4 KB apart, where that cache is small (Zen 4, 32 KB: bf16 at 56 % of the bandwidth so, 80 % from the second; attention 42 and 67 %).
static inline __attribute__((always_inline)) void ask_for(const void* at, int cache) {
    cache == 1 ? __builtin_prefetch(at, 0, 3) : __builtin_prefetch(at, 0, 2);
}

// How rows of weights are asked for: so many bytes ahead (the next row of a stream follows on this one), or not at all; into which cache.
template <size_t Bytes, int Cache>
struct Asks {
    static constexpr int kCache = Cache;
    static inline __attribute__((always_inline)) void ahead_of(const void* at) {
        if (Bytes) ask_for(static_cast<const char*>(at) + Bytes, Cache);
    }
};

// Asks for scales of rows to come, a line at a time: they are read too slowly for the processor to do it (Zen 5: int4 at 64 % of the
// bandwidth without, 88 % with).
static inline __attribute__((always_inline)) void prefetch_scale(const float* scales, size_t group) {
    if (group % 16 == 0) __builtin_prefetch(scales + group + 128);
}

// What a row's sums begin with in 8 lanes: its groups' scales times what is added to each.
static inline __attribute__((always_inline)) void sum_offsets(const float* scales, const Integers& x, Floats8* to) {
    Floats8 sums = {};
    size_t g = 0;
    for (; g + 8 <= x.num_groups; g += 8) {
        const Floats8 exact = __builtin_convertvector(*reinterpret_cast<const Ints8*>(x.offsets + g), Floats8);
        sums += *reinterpret_cast<const Floats8*>(scales + g) * (*reinterpret_cast<const Floats8*>(x.scales + g) * exact);
    }
    for (; g < x.num_groups; ++g) sums[g % 8] += scales[g] * (x.scales[g] * static_cast<float>(x.offsets[g]));
    *to = sums;
}

// Asks for a row of the next tile, while this one is worked on: a burst of requests would hold up what it is for.
template <class Element>
static inline __attribute__((always_inline)) void prefetch_row(const Element* row, size_t dim, int cache) {
    const char* at = reinterpret_cast<const char*>(row);
    for (size_t b = 0; b < dim * sizeof(Element); b += 64) ask_for(at + b, cache);
}
